"""The query ring: its write, one small launch a layer inside the captured graph; what its readers check."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cache_layout import FP8, PLAIN, PagedKV
from .decode import decoded


@triton.jit
def _record_kernel(
    queries_ptr, ring_indices_ptr, ring_ptr, query_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    index = tl.load(ring_indices_ptr + token)
    if index < 0:
        return
    offset = tl.arange(0, BLOCK)
    inside = offset < WIDTH
    query = tl.load(queries_ptr + token.to(tl.int64) * query_stride + offset, mask=inside)
    tl.store(ring_ptr + index.to(tl.int64) * WIDTH + offset, decoded(query), mask=inside)


def capture(queries: torch.Tensor, ring_indices: torch.Tensor, ring: torch.Tensor) -> None:
    """Copy the queries of chosen tokens into one layer's ring.

    Args:
        queries: [tokens, Hq, D], the last two dimensions contiguous; in the ring's dtype or in FP8.
        ring_indices: int32 [>= tokens], where each token's query goes, or -1.
        ring: [rows, size, Hq, D], contiguous; index ``p`` is ``[p // size, p % size]``.
    """
    width = queries.shape[1] * queries.shape[2]
    _record_kernel[(queries.shape[0],)](
        queries,
        ring_indices,
        ring,
        queries.stride(0),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
    )


def check_queries(queries: torch.Tensor, kv: PagedKV, *, at_least: int) -> None:
    """Raises: ValueError unless a ring fits the cache.

    Args:
        queries: [L, rows, ring, Hq, D].
        kv: the cache.
        at_least: tokens whose queries the ring has to hold.
    """
    expected = (kv.num_layers, kv.head_size)
    if queries.dim() != 5 or (queries.shape[0], queries.shape[4]) != expected or queries.shape[2] < at_least:
        raise ValueError(
            f"a query ring of shape {tuple(queries.shape)} does not fit {kv.num_layers} layers, "
            f"{at_least} tokens and head size {kv.head_size}"
        )
    if queries.shape[3] % kv.num_heads or not 1 <= queries.shape[3] // kv.num_heads <= 16:
        raise ValueError(f"{queries.shape[3]} query heads do not fit {kv.num_heads} KV heads")
    dtypes = PLAIN if kv.dtype in FP8 else (kv.dtype,)
    if queries.dtype not in dtypes or queries.device != kv.device or queries.stride(4) != 1:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"the query ring must be contiguous {names} on {kv.device}")
