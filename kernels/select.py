"""Selection of the highest scores of each (layer, request, KV head), in ascending order or best first.

No sort: the score at the cut is found two bits at a time on an order-preserving integer view of float32,
each time with one count over the scores; one more pass writes the slots above the cut and, lowest first, as
many at the cut as there is room for. For the order of the scores a second kernel counts, for each chosen
slot, those that go before it. Formulas: rkv_spec 1.4, 1.6 and 1.9; reference: ``naive.select`` of
``naive.protected``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .work_slice import WorkSlice, locate, scores_of

_BLOCKS = (2048, 4096, 8192)  # tokens that a program keeps in registers
SELECT_LENGTHS = (2048, 4096, 8192, 8193)
"""One length, in tokens, for each variant of the kernel."""
_RANKED = 64  # chosen slots a program of the second kernel
_RIVALS = 64  # slots that it compares them with at a time


@triton.jit
def _ordered(scores, slots, protected, candidates):
    """Scores as uint32 in the same order; NaN as minus infinity, zeros equal, 0 behind the candidates.

    The first `protected` slots are above every score.
    """
    score = tl.load(scores + slots, mask=slots < candidates, other=0.0)
    score = tl.where(score == 0.0, 0.0, tl.where(score != score, float("-inf"), score))
    bits = score.to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    ordered = tl.where(slots < protected, 0xFFFFFFFF, ordered)
    return tl.where(slots < candidates, ordered, 0)


@triton.jit
def _three_counts(ordered, cut, shift):
    """Whether a score reaches the cut with its next two bits at 1, 2 and 3: one 20-bit field each.

    A program adds up at most 2^20 - 1 of them in a lane, which is enough for 2^33 scores.
    """
    one = (ordered >= (cut | (tl.full((), 1, tl.uint32) << shift))).to(tl.int64)
    two = (ordered >= (cut | (tl.full((), 2, tl.uint32) << shift))).to(tl.int64)
    three = (ordered >= (cut | (tl.full((), 3, tl.uint32) << shift))).to(tl.int64)
    return one | (two << 20) | (three << 40)


@triton.jit(
    do_not_specialize=[
        "stride_layer",
        "stride_request",
        "stride_head",
        "first_layer",
        "first_request",
        "requests",
    ],
    do_not_specialize_on_alignment=["scores"],
)
def _select_kernel(
    lengths,  # [R]
    keeps,  # [R]
    protects,  # [R]
    scores,  # [layers, requests, H, slots] by its strides
    stride_layer,
    stride_request,
    stride_head,
    kept,  # [owners, capacity]
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    _, request, local_request, head, owner = locate(first_layer, first_request, requests, HEADS)
    kept += owner * capacity
    scores = scores_of(scores, stride_layer, stride_request, stride_head, local_request, head)
    candidates = tl.load(lengths + request) - WINDOW
    count = tl.load(keeps + request) - WINDOW
    protected = tl.load(protects + request)

    cut = tl.full((), 0, tl.uint32)
    resident = _ordered(scores, tl.arange(0, BLOCK), protected, candidates)
    for position in range(0, 16):
        shift = 30 - 2 * position
        counts = _three_counts(resident, cut, shift)
        if not RESIDENT:
            for start in range(BLOCK, candidates, BLOCK):
                slots = start + tl.arange(0, BLOCK)
                counts += _three_counts(_ordered(scores, slots, protected, candidates), cut, shift)
        if RESIDENT:  # one sum does for all three fields
            total = tl.sum(counts, axis=0)
            one, two, three = total & 0xFFFFF, (total >> 20) & 0xFFFFF, total >> 40
        else:
            one = tl.sum(counts & 0xFFFFF, axis=0)
            two = tl.sum((counts >> 20) & 0xFFFFF, axis=0)
            three = tl.sum(counts >> 40, axis=0)
        digit = (one >= count).to(tl.uint32) + (two >= count).to(tl.uint32) + (three >= count).to(tl.uint32)
        cut |= digit << shift
    above = (resident > cut).to(tl.int32)
    if not RESIDENT:
        for start in range(BLOCK, candidates, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            above += (_ordered(scores, slots, protected, candidates) > cut).to(tl.int32)
    room = count - tl.sum(above, axis=0)

    written = 0
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        ordered = _ordered(scores, slots, protected, candidates)
        level = ((ordered == cut) & (slots < candidates)).to(tl.int32)
        chosen = (ordered > cut) | ((level > 0) & (tl.cumsum(level, axis=0) <= room))
        chosen = chosen.to(tl.int32)
        place = written + tl.cumsum(chosen, axis=0) - 1
        tl.store(kept + place, slots, mask=chosen > 0)
        written += tl.sum(chosen, axis=0)
        room -= tl.minimum(tl.sum(level, axis=0), room)


@triton.jit(
    do_not_specialize=[
        "stride_layer",
        "stride_request",
        "stride_head",
        "first_layer",
        "first_request",
        "requests",
    ],
    do_not_specialize_on_alignment=["scores"],
)
def _rank_kernel(
    lengths,  # [R]
    keeps,  # [R]
    protects,  # [R]
    scores,  # [layers, requests, H, slots] by its strides
    stride_layer,
    stride_request,
    stride_head,
    chosen,  # [owners, capacity], ascending
    kept,  # [owners, capacity], best first
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    RANKED: tl.constexpr,
    RIVALS: tl.constexpr,
):
    _, request, local_request, head, owner = locate(first_layer, first_request, requests, HEADS)
    scores = scores_of(scores, stride_layer, stride_request, stride_head, local_request, head)
    chosen += owner * capacity
    kept += owner * capacity
    candidates = tl.load(lengths + request) - WINDOW
    count = tl.load(keeps + request) - WINDOW
    protected = tl.load(protects + request)
    own = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    if tl.program_id(0) * RANKED >= count:
        return
    slots = tl.load(chosen + own, mask=own < count, other=0)
    values = _ordered(scores, slots, protected, candidates)
    rank = tl.zeros((RANKED,), tl.int32)
    for start in range(0, count, RIVALS):
        rivals = start + tl.arange(0, RIVALS)
        rival_slots = tl.load(chosen + rivals, mask=rivals < count, other=0)
        rival_values = _ordered(scores, rival_slots, protected, candidates)
        better = rival_values[None, :] > values[:, None]
        older = (rival_values[None, :] == values[:, None]) & (rivals[None, :] < own[:, None])
        before = (better | older) & (rivals < count)[None, :]
        rank += tl.sum(before.to(tl.int32), axis=1)
    tl.store(kept + rank, slots, mask=own < count)


def select(work: WorkSlice, scores: torch.Tensor, *, window: int) -> None:
    """Write the chosen slots, keep - window an owner, to ``work.kept`` in their order.

    For the order of the scores, ``work.chosen_slots`` is overwritten.

    Args:
        work: requests and layers.
        scores: float32 [layers, requests, H, >= longest - window] of the slice, last stride 1; NaN counts as
            the lowest score.
        window: number of newest tokens, which are kept without a score.
    """
    batch, heads = work.batch, work.kv.num_heads
    chosen = work.kept if batch.order == "temporal" else work.chosen_slots
    block = next((size for size in _BLOCKS if work.longest <= size), _BLOCKS[-1])
    _select_kernel[work.grid()](
        batch.lengths_on_device,
        batch.keeps_on_device,
        batch.protects_on_device,
        scores,
        *scores.stride()[:3],
        chosen,
        *work.slice_args(),
        HEADS=heads,
        WINDOW=window,
        BLOCK=block,
        RESIDENT=work.longest <= block,
        num_warps=8,
    )
    if batch.order == "score":
        _rank_kernel[work.grid(-(-work.longest // _RANKED))](
            batch.lengths_on_device,
            batch.keeps_on_device,
            batch.protects_on_device,
            scores,
            *scores.stride()[:3],
            chosen,
            work.kept,
            *work.slice_args(),
            HEADS=heads,
            WINDOW=window,
            RANKED=_RANKED,
            RIVALS=_RIVALS,
            num_warps=4,
        )
