"""The query ring's write: one small launch a layer, inside the captured graph."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
    tl.store(ring_ptr + index.to(tl.int64) * WIDTH + offset, query, mask=inside)


def capture(queries: torch.Tensor, ring_indices: torch.Tensor, ring: torch.Tensor) -> None:
    """Copy the queries of chosen tokens into one layer's ring.

    Args:
        queries: [tokens, Hq, D], the last two dimensions contiguous.
        ring_indices: int32 [>= tokens], where each token's query goes, or -1.
        ring: [rows, window, Hq, D], contiguous, in the queries' dtype; index ``p`` is ``[p // window, p %
            window]``.
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
