"""Keys as pairs of rotated dimensions, and the features of them that no rotation changes (rkv_spec 4.1).

Reference: ``rotary_pairs.RotaryPairs.features``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decoded


@triton.jit
def load_pairs(
    base,
    offsets,
    inside,  # [rows], which of them exist
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FEATURES_PAD: tl.constexpr,
):
    """First and second member of each pair, [rows, FEATURES_PAD] each; 0 where there is none."""
    HALF: tl.constexpr = ROTATED // 2
    FEATURES: tl.constexpr = HEAD_SIZE - HALF
    feature = tl.arange(0, FEATURES_PAD)
    if INTERLEAVED:
        first = tl.where(feature < HALF, 2 * feature, feature + HALF)
        second = 2 * feature + 1
    else:
        first = tl.where(feature < HALF, feature, feature + HALF)
        second = feature + HALF
    firsts = base + offsets[:, None] + first[None, :]
    seconds = base + offsets[:, None] + second[None, :]
    has_first = inside[:, None]
    has_second = inside[:, None]
    if FEATURES_PAD != HALF:
        has_first = has_first & (feature < FEATURES)[None, :]
        has_second = has_second & (feature < HALF)[None, :]
    a = tl.load(firsts, mask=has_first, other=0.0)
    b = tl.load(seconds, mask=has_second, other=0.0)
    return decoded(a), decoded(b)


@triton.jit
def features_of(a, b, ROTATED: tl.constexpr, FEATURES_PAD: tl.constexpr):
    """float32 [tokens, FEATURES_PAD]: lengths of pairs, and what is not rotated as it is (rkv_spec 4.1)."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    length = tl.sqrt(a * a + b * b)
    if FEATURES_PAD == ROTATED // 2:
        return length
    return tl.where((tl.arange(0, FEATURES_PAD) < ROTATED // 2)[None, :], length, a)
