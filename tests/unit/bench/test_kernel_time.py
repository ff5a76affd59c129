"""Kernels of a trace, by class."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rkv_vllm.bench.kernel_time import OTHER, class_of, kernel_time, read_trace

KERNELS = Path(__file__).parents[3] / "kernels"


def kernel(name: str, start: float, duration: float, category: str = "kernel") -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": start, "dur": duration}


def test_classes_busy_and_idle_time() -> None:
    """Proves that times are summed by class, that overlapping kernels leave no idle time, and gaps do."""
    events = [
        kernel("_matches_kernel", 0, 1000),
        kernel("flash_fwd_splitkv", 500, 1000),  # overlaps
        kernel("cutlass::gemm", 2500, 500),  # after a gap of 1 ms
        kernel("Memcpy DtoH", 3000, 100, "gpu_memcpy"),
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
        {"ph": "M", "name": "process_name"},
    ]
    found = kernel_time(events, steps=2)
    assert found.span == pytest.approx(1.55) and found.idle == pytest.approx(0.5)
    assert found.classes == pytest.approx(
        {"compaction": 0.5, "attention": 0.5, "products": 0.25, "copies": 0.05}
    )
    assert [each.in_class for each in found.kernels] == ["compaction", "attention", "products", "copies"]
    assert found.kernels[2].calls_per_step == 0.5


def test_every_kernel_of_this_package_is_known() -> None:
    """Proves that a kernel added to kernels/ is counted as the extension's, under its own class."""
    names = [
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    ]
    assert len(names) > 8
    assert {class_of(name) for name in names} == {"compaction", "extension per step"}
    assert class_of("void something_else<float>") == OTHER


def test_reading_traces(tmp_path: Path) -> None:
    """Proves that plain and compressed traces read alike, and that one without a kernel is an error."""
    content = json.dumps({"traceEvents": [kernel("gemm", 0, 10)]})
    plain, packed = tmp_path / "a.json", tmp_path / "a.json.gz"
    plain.write_text(content)
    packed.write_bytes(gzip.compress(content.encode()))
    assert read_trace(plain, 1) == read_trace(packed, 1)
    with pytest.raises(ValueError, match="no kernels"):
        kernel_time([], 1)
