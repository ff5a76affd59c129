"""Access to the KV cache of vLLM's CPU attention, through vLLM's own operator."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rkv_vllm.execution.cpu import layer_cache as cpu_cache
from rkv_vllm.execution.cpu.layer_cache import CpuLayerCache, CpuPageLayout

LAYOUTS = pytest.mark.parametrize(
    ("isa", "page_size", "head_size"),
    [
        *(("vec", page_size, head_size) for page_size in (32, 64, 128) for head_size in (64, 128)),
        *(("vec16", page_size, head_size) for page_size in (32, 64, 128) for head_size in (64, 80, 128)),
        ("vec16", 16, 80),
    ],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HEADS = 3


def layer(isa: str, dtype: torch.dtype, page_size: int, head_size: int, pages: int) -> Any:
    """What `CpuLayerCache` takes from an attention layer; its cache begins as noise."""
    cache = torch.randn(pages, HEADS, page_size, 2 * head_size).to(dtype)
    return SimpleNamespace(
        kv_cache=cache, isa=isa, head_size=head_size, impl=SimpleNamespace(scale=head_size**-0.5)
    )


def tokens(count: int, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, HEADS, count, head_size).to(dtype)
    return keys, values


@LAYOUTS
@DTYPES
def test_what_the_operator_writes_is_read(
    isa: str, dtype: torch.dtype, page_size: int, head_size: int
) -> None:
    """Proves that tokens which vLLM's operator writes into scattered pages are read back, bit by bit."""
    torch.manual_seed(0)
    attention = layer(isa, dtype, page_size, head_size, pages=7)
    cache = CpuLayerCache(attention)
    pages, length = torch.tensor([5, 0, 3]), 2 * page_size + 5
    keys, values = tokens(length, head_size, dtype)
    slots = (pages.unsqueeze(1) * page_size + torch.arange(page_size)).flatten()[:length]
    by_token = (keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous())
    cache_write = cpu_cache._write  # the operator alone
    cache_write(attention.kv_cache, *by_token, slots, isa)
    for read, written in zip(cache.read(pages, length), (keys, values), strict=True):
        torch.testing.assert_close(read, written, rtol=0, atol=0)


@LAYOUTS
@DTYPES
def test_moved_tokens_leave_all_others(isa: str, dtype: torch.dtype, page_size: int, head_size: int) -> None:
    """Proves that writing survivors changes their slots and nothing else, in this and in other pages."""
    torch.manual_seed(1)
    attention = layer(isa, dtype, page_size, head_size, pages=5)
    cache = CpuLayerCache(attention)
    every_page = torch.arange(5)
    before = [part.clone() for part in cache.read(every_page, 5 * page_size)]
    length = page_size + 3
    keys, values = tokens(length, head_size, dtype)
    cache.write(torch.tensor([4, 1]), keys, values)
    for part, new, old in zip(cache.read(every_page, 5 * page_size), (keys, values), before, strict=True):
        expected = old.clone()
        expected[:, 4 * page_size :] = new[:, :page_size]
        expected[:, page_size : page_size + 3] = new[:, page_size:]
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


def test_layout_of_plain_kernels() -> None:
    """Proves the layout that `vec16` is known to have: keys by dimension, values by token."""
    layout = CpuPageLayout.probe("vec16", torch.float32, 16, 64)
    places = torch.arange(16 * 64)
    assert torch.equal(layout.key_offsets.view(16, 64), places.view(64, 16).T)
    assert torch.equal(layout.value_offsets, 16 * 64 + places)


Fault = Callable[[torch.Tensor], None]


def _lose_an_element(page: torch.Tensor) -> None:
    page.view(-1)[3] = page.view(-1)[2]


def _forget_an_element(page: torch.Tensor) -> None:
    page.view(-1)[17] = -1.0


def _halve(page: torch.Tensor) -> None:
    page.div_(2, rounding_mode="floor")


def _swap_differently_each_time(page: torch.Tensor) -> None:
    flat = page.view(-1)
    flat.copy_(flat[torch.randperm(flat.numel())])


@pytest.mark.parametrize("fault", [_lose_an_element, _forget_an_element, _halve, _swap_differently_each_time])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unknown_way_to_keep_tokens_is_refused(
    fault: Fault, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that an operator which loses, doubles, changes or scrambles elements is refused by its name."""

    def operator(keys: Any, values: Any, key_cache: Any, value_cache: Any, *args: Any, **kwargs: Any) -> None:
        key_cache.copy_(keys.reshape(key_cache.shape))
        value_cache.copy_(values.reshape(value_cache.shape))
        fault(key_cache._base if key_cache._base is not None else key_cache)

    torch.manual_seed(2)
    monkeypatch.setattr(cpu_cache.ops, "cpu_attn_reshape_and_cache", operator)
    with pytest.raises(ValueError, match=r"'avx1024' for torch\.\w+, head size 64 and pages of 32 tokens"):
        CpuPageLayout.probe("avx1024", dtype, 32, 64)


def test_any_fixed_permutation_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the layout is found by looking, not known: a page in a random fixed order is read right."""
    order = torch.randperm(2 * 32 * 64, generator=torch.Generator().manual_seed(3))

    def operator(keys: Any, values: Any, key_cache: Any, value_cache: Any, *args: Any, **kwargs: Any) -> None:
        page = key_cache._base.view(-1)
        page[order] = torch.cat([keys.flatten(), values.flatten()])

    monkeypatch.setattr(cpu_cache.ops, "cpu_attn_reshape_and_cache", operator)
    layout = CpuPageLayout.probe("other", torch.bfloat16, 32, 64)
    assert torch.equal(torch.cat([layout.key_offsets, layout.value_offsets]), order)
