"""The kernels compiled for an H100, wherever the tests run: what Triton's interpreter does not tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support

from rkv_vllm import kernels

COMPILE = Path(support.__file__).parent / "compile_for_hopper.py"
#: Bytes that one program may have on an H100.
SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize(
    ("dtype", "query_dtype", "head_size", "rotated", "group"),
    [
        ("bfloat16", "bfloat16", 128, 128, 4),
        ("float16", "float16", 80, 40, 3),
        ("float32", "float32", 256, 256, 8),
        ("bfloat16", "bfloat16", 64, 0, 16),
        ("float8_e4m3fn", "bfloat16", 128, 128, 4),
        ("float8_e4m3fn", "float16", 80, 40, 3),
        ("float8_e5m2", "bfloat16", 256, 256, 8),
    ],
)
def test_every_kernel_compiles_and_fits(
    dtype: str, query_dtype: str, head_size: int, rotated: int, group: int, tmp_path: Path
) -> None:
    """Proves that each kernel of this package compiles for Hopper, and within its shared memory."""
    result = subprocess.run(
        [sys.executable, COMPILE, dtype, query_dtype, *map(str, (head_size, rotated, group))],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    written = {
        name
        for file in Path(kernels.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {kernel["kernel"] for kernel in compiled} == written
    assert max(kernel["shared"] for kernel in compiled) <= SHARED_MEMORY
