"""Caches in FP8: how bytes are read, and that rounds over them are rounds over the numbers in them.

Scores of FP8 caches are compared with the float64 reference in ``test_compaction_round.py`` and
``test_invariant.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support.paged_cache import DEVICE, GPU, PagedCache
from support.plain_cache import all_layers

from rkv_vllm.decisions.messages import PageCompaction, TokenCompaction
from rkv_vllm.decisions.query_rows import NO_QUERY_ROW
from rkv_vllm.execution.gpu.compactor import GpuPageCompactor, GpuTokenCompactor
from rkv_vllm.kernels.cache_layout import FP8, PagedKV
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.decode import decoded
from rkv_vllm.kernels.query_capture import capture
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import make_policies
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.policy_table import NUM_QUERIES, POLICY_NAMES

FORMATS = pytest.mark.parametrize("dtype", FP8, ids=lambda dtype: str(dtype).removeprefix("torch."))


@triton.jit
def _read_kernel(stored, numbers, wide, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    read = decoded(tl.load(stored + index))
    tl.store(numbers + index, read)
    tl.store(wide + index, read.to(tl.float32))


@FORMATS
def test_every_byte_is_read_as_its_number(dtype: torch.dtype) -> None:
    """Proves reading exact for all 256 bytes, zeros with their signs and the smallest numbers among them."""
    stored = torch.arange(256, device=DEVICE).to(torch.uint8).view(dtype)
    expected = stored.float()
    numbers, wide = torch.empty(256, dtype=torch.float16, device=DEVICE), torch.empty(256, device=DEVICE)
    _read_kernel[(1,)](stored, numbers, wide, COUNT=256)
    is_number = ~expected.isnan()
    assert is_number.sum() == (254 if dtype == torch.float8_e4m3fn else 250)
    for read in (numbers.float(), wide):
        assert torch.equal(read[is_number].view(torch.int32), expected[is_number].view(torch.int32))
        if GPU or dtype != torch.float8_e4m3fn:  # Triton's interpreter does not know e4m3's two NaN
            assert read[~is_number].isnan().all()


@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fp8_queries_are_captured_as_they_are(model: torch.dtype) -> None:
    """Proves that every number which attention may get as a query in FP8 is in the ring, in any dtype."""
    every_byte = torch.arange(256, device=DEVICE).to(torch.uint8).view(torch.float8_e4m3fn)
    queries = every_byte[~every_byte.float().isnan()][:252].view(3, 2, 42)
    ring = torch.full((2, 4, 2, 42), 7.0, dtype=model, device=DEVICE)
    capture(queries, torch.tensor([5, -1, 2, 0], dtype=torch.int32, device=DEVICE), ring)
    expected = torch.full((8, 2, 42), 7.0, device=DEVICE)
    expected[5], expected[2] = queries[0].float(), queries[2].float()
    assert torch.equal(ring.float().flatten(0, 1), expected)


class Setup:
    """A request a policy in an FP8 cache, and the same numbers in a cache of float32."""

    def __init__(self, dtype: torch.dtype, granularity: str) -> None:
        lengths = [61 + 7 * index for index in range(len(POLICY_NAMES))]
        shape: dict[str, Any] = {"layers": 2, "heads": 2, "group": 3, "head_size": 32, "shift": 0.0}
        self.cache = cache = PagedCache(lengths, dtype=dtype, seed=11, **shape)
        self.layers = {"fp8": cache.layers, "numbers": [layer.float() for layer in cache.layers]}
        config = RkvConfig(mix_lambda=0.3, granularity=granularity)
        kind: Any = GpuTokenCompactor if granularity == "token" else GpuPageCompactor
        self.compactors = {
            name: kind(
                layers,
                cache.queries,
                lambda: cache.factors,
                config,
                make_policies(config),
                group=all_layers(2),
                pairs=RotaryPairs(32),
                longest=max(lengths),
                ranks_per_kv_head=1,
            )
            for name, layers in self.layers.items()
        }

    def common(self, index: int) -> dict[str, Any]:
        """What messages of either granularity say of a request."""
        length, policy = self.cache.lengths[index], POLICY_NAMES[index]
        self.cache.ends[index] = length
        return {
            "request_id": policy,
            "length": length,
            "policy": policy,
            "query_row": self.cache.rows[index] if NUM_QUERIES[policy] else NO_QUERY_ROW,
            "num_queries": NUM_QUERIES[policy],
            "protect": 3 * index,
        }


class Tables:
    """The block table of a runner."""

    def __init__(self, rows: dict[str, torch.Tensor] | None = None) -> None:
        self._rows = rows or {}

    def page_row(self, request_id: str) -> torch.Tensor:
        return self._rows[request_id]

    def replace_pages(self, request_id: str, pages: Any) -> None:
        """Nobody asks for them."""

    def set_num_pages(self, request_id: str, pages: int) -> None:
        """Nobody asks for it."""


@FORMATS
def test_rounds_over_bytes_are_rounds_over_numbers(dtype: torch.dtype) -> None:
    """Proves for every policy that an FP8 cache keeps the bytes of the tokens that its numbers would keep."""
    setup = Setup(dtype, "token")
    rounds = [
        TokenCompaction(
            **setup.common(index),
            keep=40,
            evicted=length - 40,
            source_pages=(tuple(setup.cache.source[index]),),
            target_pages=(tuple(setup.cache.source[index][:3]),),
        )
        for index, length in enumerate(setup.cache.lengths)
    ]
    before = torch.stack(setup.layers["numbers"])
    for compactor in setup.compactors.values():
        compactor.run(rounds, Tables())
    numbers = torch.stack(setup.layers["numbers"])
    assert not torch.equal(numbers, before)
    assert torch.equal(torch.stack([layer.float() for layer in setup.layers["fp8"]]), numbers)


@FORMATS
def test_pages_leave_by_bytes_as_by_numbers(dtype: torch.dtype) -> None:
    """Proves for every policy that the same pages leave an FP8 cache as one of its numbers."""
    setup, reports = Setup(dtype, "page"), []
    for compactor in setup.compactors.values():
        table = torch.zeros(len(POLICY_NAMES), 8, dtype=torch.int32, device=DEVICE)
        for row, pages in zip(table, setup.cache.source, strict=True):
            row[: len(pages)] = torch.tensor(pages)
        rows = dict(zip(POLICY_NAMES, table, strict=True))
        rounds = [
            PageCompaction(**setup.common(index), keep=length - 32, evicted=32, eviction_id=index)
            for index, length in enumerate(setup.cache.lengths)
        ]
        compactor.run(rounds, Tables(rows))
        (step,) = compactor.take_evicted()
        reports.append(step.reports())
    assert reports[0] == reports[1]
    assert all(len(report.pages) == 2 for report in reports[0])


def test_other_bytes_are_refused() -> None:
    """Proves that a cache whose bytes have no known meaning is refused before it is scored."""
    kv = PagedKV([torch.zeros(4, 1, 16, 64, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"uint8 cannot be scored: only float32, .* float8_e5m2 can"):
        CompactionRound(kv)
