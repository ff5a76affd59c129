"""Physical lengths and positions of a batch, and its indices into the query ring, in one launch a step."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_requests"])
def _physical_kernel(
    request_slots_ptr,  # [R]
    query_starts_ptr,  # [R + 1]
    seq_lens_ptr,  # [R], logical
    evicted_ptr,  # [slots]
    query_rows_ptr,  # [slots], -1: not captured
    physical_seq_lens_ptr,  # [max R]
    physical_positions_ptr,  # [max tokens]
    ring_indices_ptr,  # [max tokens]
    num_requests,
    max_requests,
    max_tokens,
    RING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    if request == num_requests:
        # What a captured graph reads behind the batch: no keys, and nothing to capture.
        for start in range(num_requests, max_requests, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            tl.store(physical_seq_lens_ptr + offset, 0, mask=offset < max_requests)
        for start in range(tl.load(query_starts_ptr + num_requests), max_tokens, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            tl.store(ring_indices_ptr + offset, -1, mask=offset < max_tokens)
        return

    slot = tl.load(request_slots_ptr + request)
    evicted = tl.load(evicted_ptr + slot)
    row = tl.load(query_rows_ptr + slot)
    logical = tl.load(seq_lens_ptr + request)
    first = tl.load(query_starts_ptr + request)
    count = tl.load(query_starts_ptr + request + 1) - first
    tl.store(physical_seq_lens_ptr + request, logical - evicted)
    for start in range(0, count, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < count
        position = logical - count + offset
        tl.store(physical_positions_ptr + first + offset, (position - evicted).to(tl.int64), mask=inside)
        captured = (row >= 0) & (position >= logical - RING)
        index = tl.where(captured, row * RING + position % RING, -1)
        tl.store(ring_indices_ptr + first + offset, index, mask=inside)


def prepare_physical(
    request_slots: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    evicted: torch.Tensor,
    query_rows: torch.Tensor,
    *,
    physical_seq_lens: torch.Tensor,
    physical_positions: torch.Tensor,
    ring_indices: torch.Tensor,
    ring_size: int,
) -> None:
    """Fill the buffers that attention and the query ring read in the coming forward pass.

    Args:
        request_slots: integer [R], each request's slot in the per-slot tables.
        query_starts: int32 [>= R + 1], first token of each request in the batch.
        seq_lens: int32 [>= R], logical length of each request, this step's tokens included.
        evicted: int32 [slots], tokens evicted from each request.
        query_rows: int32 [slots], row of the query ring, or -1 where nothing is captured.
        physical_seq_lens: int32 [max R], written: keys that attention reads; 0 behind the batch.
        physical_positions: int64 [max tokens], written up to the batch's last token: slot of each token
            within its request.
        ring_indices: int32 [max tokens], written: index in the ring of each of a captured request's newest
            ``ring_size`` tokens, ``row * ring_size + position % ring_size``; -1 for all others and behind the
            batch.
        ring_size: queries that a row of the ring holds.
    """
    num_requests = request_slots.shape[0]
    _physical_kernel[(num_requests + 1,)](
        request_slots,
        query_starts,
        seq_lens,
        evicted,
        query_rows,
        physical_seq_lens,
        physical_positions,
        ring_indices,
        num_requests,
        physical_seq_lens.shape[0],
        ring_indices.shape[0],
        RING=ring_size,
        BLOCK=_BLOCK,
    )
