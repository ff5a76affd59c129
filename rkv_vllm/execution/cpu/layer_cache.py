"""Reads and writes tokens in the KV cache of vLLM's CPU attention, whatever layout its kernels chose.

Each instruction set (`layer.isa`) interleaves the elements of a page in its own way. Instead of knowing them,
a page is filled through vLLM's own operator with numbered elements once, at start, and read back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.execution.stored_types import FP8_TYPES

#: Digits of an element's number are written one at a time, small enough to be exact in every type: e5m2 has
#: three significant bits.
_BASE = 8


@dataclass(frozen=True)
class CpuPageLayout:
    """Where a page keeps its elements.

    Attributes:
        key_offsets: int64 [page size * head size], offset of (slot, dimension) of K in the flat page.
        value_offsets: likewise for V.
    """

    key_offsets: torch.Tensor
    value_offsets: torch.Tensor

    @classmethod
    def probe(
        cls, isa: str, dtype: torch.dtype, page_size: int, head_size: int, cache_dtype: str = "auto"
    ) -> CpuPageLayout:
        """Finds the layout by writing one page.

        Args:
            isa: vLLM's name of the kernels.
            dtype: of the keys and values that the operator is given.
            page_size: tokens a page.
            head_size: elements of a key.
            cache_dtype: vLLM's name of what the cache holds; "auto": elements as they are given.

        Raises: ValueError where the operator does not keep each element once and unchanged.
        """
        elements = page_size * head_size
        numbers = torch.arange(2 * elements)
        found = torch.zeros(2 * elements, dtype=torch.int64)
        place = 1
        while place <= 2 * elements:
            digits = (numbers // place % _BASE).to(dtype)
            key, value = digits.view(2, page_size, 1, head_size)
            page = torch.full((1, 1, page_size, 2 * head_size), -1.0).to(FP8_TYPES.get(cache_dtype, dtype))
            stored = page.view(torch.uint8) if cache_dtype in FP8_TYPES else page
            _write(stored, key.contiguous(), value.contiguous(), torch.arange(page_size), isa, cache_dtype)
            found += page.flatten().float().to(torch.int64) * place
            place *= _BASE
        offsets = torch.empty_like(found)
        if not torch.equal(found.sort().values, numbers):
            raise ValueError(
                f"rkv-vllm cannot read the KV cache ({cache_dtype}) of vLLM's CPU attention kernels {isa!r} "
                f"for {dtype}, "
                f"head size {head_size} and pages of {page_size} tokens"
            )
        offsets[found] = numbers
        return cls(key_offsets=offsets[:elements], value_offsets=offsets[elements:])


class CpuLayerCache:
    """The cache of one layer."""

    def __init__(self, layer: Attention) -> None:
        self._layer = layer
        self._cache: torch.Tensor = layer.kv_cache  # [pages, H, page size, 2 D]
        self._head_size: int = layer.head_size
        self.page_size: int = self._cache.shape[2]
        self._layout = CpuPageLayout.probe(
            layer.isa, layer.dtype, self.page_size, self._head_size, layer.kv_cache_dtype
        )

    @property
    def scale(self) -> float:
        """What makes attention logits of products of queries and `numbers` of keys; weights may change it."""
        factor: float = self._layer.impl.scale
        return factor * self._layer._k_scale_float if self._layer.kv_cache_dtype in FP8_TYPES else factor

    def numbers(self, stored: torch.Tensor) -> torch.Tensor:
        """What `read` gave as numbers: bytes in FP8 as float16, which holds each exactly."""
        name = self._layer.kv_cache_dtype
        return stored.view(FP8_TYPES[name]).to(torch.float16) if name in FP8_TYPES else stored

    def read(self, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies the tokens of a request out.

        Args:
            pages: int64 [ceil(length / page size)].
            length: tokens, from the first slot of the first page on.

        Returns: keys and values as they are stored, FP8 as bytes, each [H, length, D].
        """
        flat = self._cache[pages].flatten(2)  # [pages, H, page size * 2 D]
        num_pages, heads, _ = flat.shape

        def tokens(offsets: torch.Tensor) -> torch.Tensor:
            by_page = flat.index_select(2, offsets).view(num_pages, heads, self.page_size, self._head_size)
            return by_page.transpose(0, 1).flatten(1, 2)[:, :length]

        return tokens(self._layout.key_offsets), tokens(self._layout.value_offsets)

    def write(self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes tokens into the first slots of some pages, element by element as they are.

        Args:
            pages: int64 [ceil(length / page size)].
            keys, values: [H, length, D], as `read` gives them.
        """
        heads, length, _ = keys.shape
        whole, rest = divmod(length, self.page_size)
        flat = self._cache.flatten(2)[pages]  # [pages, H, page size * 2 D], with what stays of the last page
        for part, offsets in ((keys, self._layout.key_offsets), (values, self._layout.value_offsets)):
            full, last = part.split((length - rest, rest), dim=1)
            by_page = full.reshape(heads, whole, len(offsets)).transpose(0, 1)
            flat[:whole].index_copy_(2, offsets, by_page)
            if rest:
                flat[-1].index_copy_(1, offsets[: rest * self._head_size], last.flatten(1))
        self._cache[pages] = flat.view(-1, *self._cache.shape[1:])


def _write(
    cache: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    isa: str,
    cache_dtype: str,
) -> None:
    """vLLM's own operator; keys and values [tokens, H, D]."""
    pages, heads, page_size, _ = cache.shape
    key_cache, value_cache = cache.view(pages, heads, 2 * page_size, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys,
        values,
        key_cache,
        value_cache,
        slots,
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype=cache_dtype,
    )
