"""Access to the KV cache of vLLM's CPU attention, through vLLM's own operator."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rkv_vllm.execution.cpu import layer_cache as cpu_cache
from rkv_vllm.execution.cpu.layer_cache import CpuLayerCache, CpuPageLayout
from rkv_vllm.execution.stored_types import FP8_TYPES

HAS_FP8 = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
LAYOUTS = pytest.mark.parametrize(
    ("isa", "page_size", "head_size"),
    [
        *(("vec", page_size, head_size) for page_size in (32, 64, 128) for head_size in (64, 128)),
        *(("vec16", page_size, head_size) for page_size in (32, 64, 128) for head_size in (64, 80, 128)),
        ("vec16", 16, 80),
    ],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
#: Instructions and the model's dtype, of caches in FP8.
FP8_LAYOUTS = pytest.mark.parametrize(
    ("cache_dtype", "isa", "dtype", "page_size", "head_size"),
    [
        ("fp8", "vec", torch.bfloat16, 32, 64),
        ("fp8_e4m3", "vec", torch.float32, 128, 128),
        ("fp8_e5m2", "vec", torch.float16, 64, 96),
        ("fp8", "amx", torch.bfloat16, 64, 64),
        ("fp8_e5m2", "amx", torch.bfloat16, 32, 128),
    ],
)
HEADS = 3


def layer(
    isa: str, dtype: torch.dtype, page_size: int, head_size: int, pages: int, cache_dtype: str = "auto"
) -> Any:
    """What `CpuLayerCache` takes from an attention layer; its cache begins as noise."""
    shape = (pages, HEADS, page_size, 2 * head_size)
    plain = cache_dtype == "auto"
    return SimpleNamespace(
        kv_cache=torch.randn(shape).to(dtype) if plain else torch.randint(0, 256, shape, dtype=torch.uint8),
        kv_cache_dtype=cache_dtype,
        isa=isa,
        dtype=dtype,
        head_size=head_size,
        impl=SimpleNamespace(scale=head_size**-0.5),
        _k_scale_float=3.0,
    )


def tokens(count: int, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, HEADS, count, head_size).to(dtype)
    return keys, values


def fp8_tokens(count: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of every value, NaN and both zeros among them."""
    keys, values = torch.randint(0, 256, (2, HEADS, count, head_size), dtype=torch.uint8)
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
    cache_write(attention.kv_cache, *by_token, slots, isa, "auto")
    for read, written in zip(cache.read(pages, length), (keys, values), strict=True):
        torch.testing.assert_close(read, written, rtol=0, atol=0)


@LAYOUTS
@DTYPES
def test_moved_tokens_leave_all_others(isa: str, dtype: torch.dtype, page_size: int, head_size: int) -> None:
    """Proves that writing survivors changes their slots and nothing else, in this and in other pages."""
    torch.manual_seed(1)
    cache = CpuLayerCache(layer(isa, dtype, page_size, head_size, pages=5))
    for length in (page_size + 3, 3, page_size):
        check_moved(cache, *tokens(length, head_size, dtype))


def check_moved(cache: CpuLayerCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Writes tokens into pages 4 and 1 of 5."""
    page_size, every_page, length = cache.page_size, torch.arange(5), keys.shape[1]
    before = [part.clone() for part in cache.read(every_page, 5 * page_size)]
    cache.write(torch.tensor([4, 1])[: -(-length // page_size)], keys, values)
    for part, new, old in zip(cache.read(every_page, 5 * page_size), (keys, values), before, strict=True):
        expected = old.clone()
        first, second = new.split((min(length, page_size), max(length - page_size, 0)), dim=1)
        expected[:, 4 * page_size :][:, : first.shape[1]] = first
        expected[:, page_size:][:, : second.shape[1]] = second
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


@pytest.mark.skipif(not HAS_FP8, reason="vLLM's CPU attention needs AVX-512 or AMX to keep FP8")
@FP8_LAYOUTS
def test_fp8_that_the_operator_writes_is_read_and_moved(
    cache_dtype: str, isa: str, dtype: torch.dtype, page_size: int, head_size: int
) -> None:
    """Proves that numbers which the operator stores in FP8 are read exactly, and bytes moved as they are."""
    torch.manual_seed(0)
    attention = layer(isa, dtype, page_size, head_size, pages=5, cache_dtype=cache_dtype)
    cache = CpuLayerCache(attention)
    length = page_size + 5
    numbers = [
        torch.nan_to_num(cache.numbers(part), nan=1.5, posinf=2.0, neginf=0.0)
        + 0.0  # the operator knows no -0
        for part in fp8_tokens(length, head_size)
    ]
    slots = torch.cat((torch.arange(3 * page_size, 4 * page_size), torch.arange(5)))
    by_token = [part.to(dtype).transpose(0, 1).contiguous() for part in numbers]
    cpu_cache._write(attention.kv_cache, *by_token, slots, isa, cache_dtype)
    for read, written in zip(cache.read(torch.tensor([3, 0]), length), numbers, strict=True):
        torch.testing.assert_close(cache.numbers(read), written, rtol=0, atol=0)
    assert cache.scale == 3.0 * head_size**-0.5
    for count in (page_size + 3, 3, page_size):
        check_moved(cache, *fp8_tokens(count, head_size))


def test_a_scale_of_keys_counts_for_fp8_alone() -> None:
    """Proves that a checkpoint's scale changes no logit of a cache that is kept plain."""
    cache = CpuLayerCache(layer("vec16", torch.float32, 16, 64, pages=1))
    assert cache.scale == 64**-0.5


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
    with pytest.raises(
        ValueError, match=r"\(auto\) .* 'avx1024' for torch\.\w+, head size 64 and pages of 32 tokens"
    ):
        CpuPageLayout.probe("avx1024", dtype, 32, 64)


@pytest.mark.parametrize("cache_dtype", ["auto", *FP8_TYPES])
def test_any_fixed_permutation_is_understood(cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the layout is found by looking, not known: a page in a random fixed order is read right,
    and every byte of one in FP8 is moved as it is."""
    order = torch.randperm(2 * 32 * 64, generator=torch.Generator().manual_seed(3))

    def operator(keys: Any, values: Any, key_cache: Any, value_cache: Any, *args: Any, **kwargs: Any) -> None:
        assert kwargs == {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": cache_dtype}
        numbers = torch.cat([keys.flatten(), values.flatten()])
        base = key_cache._base if key_cache._base is not None else key_cache
        page = base.view(FP8_TYPES.get(cache_dtype, base.dtype)).view(-1)
        page[order] = numbers.to(page.dtype)

    monkeypatch.setattr(cpu_cache.ops, "cpu_attn_reshape_and_cache", operator)
    layout = CpuPageLayout.probe("other", torch.bfloat16, 32, 64, cache_dtype)
    assert torch.equal(torch.cat([layout.key_offsets, layout.value_offsets]), order)
    if cache_dtype in FP8_TYPES:
        cache = CpuLayerCache(layer("other", torch.bfloat16, 32, 64, pages=5, cache_dtype=cache_dtype))
        for count in (35, 3, 32):
            check_moved(cache, *fp8_tokens(count, 64))
        every_byte = torch.arange(256).to(torch.uint8)
        expected = every_byte.view(FP8_TYPES[cache_dtype]).float()
        torch.testing.assert_close(
            cache.numbers(every_byte).float(), expected, rtol=0, atol=0, equal_nan=True
        )
        assert cache.scale == 3.0 * 64**-0.5
