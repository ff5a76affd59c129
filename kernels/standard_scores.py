"""Standard scores of log-importance and redundancy, weighed against each other (rkv_spec 4.3 and 4.4)."""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def standardise(
    scores, redundancy, attention, candidates, important, POOL: tl.constexpr, BLOCK: tl.constexpr
):
    """From the tables of attention and redundancy to the scores of all candidates (rkv_spec 4.3 and 4.4)."""
    number = tl.maximum(candidates, 1).to(tl.float32)
    log_sum = tl.zeros((BLOCK,), tl.float32)
    redundant_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < candidates
        pooled = tl.zeros((BLOCK,), tl.float32)  # attention is never negative
        for shift in tl.static_range(POOL):
            near = slots + (shift - POOL // 2)
            value = tl.load(attention + near, mask=(near >= 0) & (near < candidates), other=0.0)
            pooled = tl.maximum(pooled, value)
        log_importance = tl.log(pooled + 1e-9)
        tl.store(scores + slots, log_importance, mask=inside)
        log_sum += tl.where(inside, log_importance, 0.0)
        redundant_sum += tl.load(redundancy + slots, mask=inside, other=0.0)
    log_mean = tl.sum(log_sum, axis=0) / number
    redundant_mean = tl.sum(redundant_sum, axis=0) / number
    tl.debug_barrier()
    log_squares = tl.zeros((BLOCK,), tl.float32)
    redundant_squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < candidates
        log_importance = tl.load(scores + slots, mask=inside, other=log_mean) - log_mean
        redundant = tl.load(redundancy + slots, mask=inside, other=redundant_mean) - redundant_mean
        log_squares += log_importance * log_importance
        redundant_squares += redundant * redundant
    log_factor = important / (tl.sqrt(tl.sum(log_squares, axis=0) / number) + 1e-6)
    redundant_factor = (1.0 - important) / (tl.sqrt(tl.sum(redundant_squares, axis=0) / number) + 1e-6)
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < candidates
        log_importance = tl.load(scores + slots, mask=inside, other=0.0) - log_mean
        redundant = tl.load(redundancy + slots, mask=inside, other=0.0) - redundant_mean
        joint = log_importance * log_factor - redundant * redundant_factor
        tl.store(scores + slots, joint, mask=inside)
