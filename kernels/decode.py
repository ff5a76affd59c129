"""Elements of a cache as the numbers that they stand for."""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decoded(stored):
    """FP8 as float16, which holds every number of both formats exactly; anything else as it is."""
    if stored.dtype == tl.float8e5:  # the upper half of a float16
        upper = stored.to(tl.uint8, bitcast=True).to(tl.uint16)
        return (upper << 8).to(tl.float16, bitcast=True)
    elif stored.dtype == tl.float8e4nv:
        return stored.to(tl.float16)
    else:
        return stored
