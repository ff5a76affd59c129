"""The arithmetic of KV bytes, pages and requests that fit."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.decisions.sizing import KvShape, PageKinds, Pool, WindowPages, peak_slots
from rkv_vllm.settings.config import CompactionSettings

BUDGET = CompactionSettings(budget=512, buffer=128, policy="rkv")


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_bytes_are_those_of_vllm(dtype: torch.dtype, size: int) -> None:
    """Proves that the bytes of a page of all layers are what vLLM reserves for it."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=dtype)
    shape = KvShape(layers=36, kv_heads=8, head_size=128, element_bytes=size)
    assert shape.bytes_per_token * 16 == 36 * spec.page_size_bytes


def test_pages_of_a_pool() -> None:
    """Proves that only whole pages count, and that vLLM's null page serves no request."""
    pool = Pool.of_bytes(10 * 16 * 100 + 1599, page_size=16, bytes_per_token=100)
    assert (pool.pages, pool.usable_pages) == (10, 9)
    assert Pool.of_bytes(1599, 16, 100).usable_pages == 0
    assert Pool.of_bytes(-5, 16, 100) == Pool(0, 16)


@pytest.mark.parametrize(
    ("slots", "pages", "requests"), [(1, 1, 9), (16, 1, 9), (17, 2, 4), (144, 9, 1), (145, 10, 0)]
)
def test_requests_that_fit(slots: int, pages: int, requests: int) -> None:
    """Proves that each request takes whole pages, down to a pool that is too small for one."""
    pool = Pool(10, 16)
    assert (pool.pages_for(slots), pool.requests_that_fit(slots)) == (pages, requests)


def test_groups_of_layers_each_take_pages() -> None:
    """Proves that each group of full attention takes pages for the slots, and each window for the text, up to
    what it sees: more of it while a prompt is computed."""
    window = WindowPages(page_size=32, most=5, most_in_prompt=20)
    pool = Pool(200, 16, PageKinds(compacted=2, windows=(window, window)))
    assert pool.pages_for(64) == 2 * 4 + 2 * 2
    assert pool.pages_for(64, length=1000) == 2 * 4 + 2 * 5
    assert pool.pages_to_start(64, length=320) == 2 * 4 + 2 * 11
    assert pool.pages_to_start(64, length=1000) == 2 * 4 + 2 * 20
    assert pool.requests_that_fit(64, length=1000) == 199 // 18


@pytest.mark.parametrize(
    ("length", "settings", "prompt", "slots"),
    [
        (4096, None, 0, 4096),
        (4096, BUDGET, 0, 640),
        (600, BUDGET, 0, 600),
        (4096, BUDGET, 640, 640),
        (4096, BUDGET, 1000, 1000),
    ],
)
def test_peak_slots(length: int, settings: CompactionSettings | None, prompt: int, slots: int) -> None:
    """Proves that a request holds its length, its budget and buffer, or its prompt, whichever bounds it."""
    lengths = None if settings is None else RequestLengths(prompt, settings)
    assert peak_slots(length, lengths) == slots
