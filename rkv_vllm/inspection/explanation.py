"""Why a policy scored tokens as it did: the parts of a score, computed anew from the same inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rkv_vllm.kernels import tiled
from rkv_vllm.policies import ScoreInputs, invariant
from rkv_vllm.settings.config import POOL_KERNEL, SIMILARITY_THRESHOLD, WINDOW, PolicyName

#: Elements of the similarities that are in memory at a time.
_TILE_ELEMENTS = 2**24
#: Of `Explanation.match`.
NO_MATCH = -1


@dataclass(frozen=True)
class Explanation:
    """The candidates of one layer in a round; None where the policy does not look at it.

    Attributes:
        importance: float32 [H, N - WINDOW].
        redundancy: float32 [H, N - WINDOW].
        match: int64 [H, N - WINDOW], slot of the newest key that is similar to the token's; `NO_MATCH`: none.
    """

    importance: torch.Tensor | None = None
    redundancy: torch.Tensor | None = None
    match: torch.Tensor | None = None


def explain(policy: PolicyName, inputs: ScoreInputs) -> Explanation:
    """The parts of the scores that a policy gives to these inputs."""
    match policy:
        case "rkv":
            keys = inputs.keys[:, :].float()
            return Explanation(
                importance=_attention(inputs, keys),
                redundancy=tiled.redundancy(keys, threshold=SIMILARITY_THRESHOLD)[:, :-WINDOW],
                match=newest_match(keys, SIMILARITY_THRESHOLD)[:, :-WINDOW],
            )
        case "snapkv":
            return Explanation(importance=_attention(inputs, inputs.keys[:, :].float()))
        case "invariant":
            return _invariant(inputs)
        case _:
            return Explanation()


def newest_match(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """For each key the newest other one that is more similar than the threshold (rkv_spec 1.3, steps 1 to 4).

    Args:
        keys: float32 [H, N, D], oldest first.
        threshold: cosine similarity that a match has to exceed.

    Returns: int64 [H, N], slots; `NO_MATCH` where the specification takes slot 0 for want of one.
    """
    units = torch.nn.functional.normalize(keys, dim=-1)
    heads, length, _ = units.shape
    slots = torch.arange(length, device=units.device)
    found = torch.empty((heads, length), dtype=torch.int64, device=units.device)
    step = max(_TILE_ELEMENTS // length, 1)
    for head, own in enumerate(units):
        for start in range(0, length, step):
            similar = own[start : start + step] @ own.T > threshold
            similar[slots[start : start + step] - start, slots[start : start + step]] = False
            found[head, start : start + step] = torch.where(similar, slots, NO_MATCH).amax(dim=-1)
    return found


def _attention(inputs: ScoreInputs, keys: torch.Tensor) -> torch.Tensor:
    assert inputs.queries is not None
    return tiled.importance(inputs.queries, keys, window=WINDOW, pool_kernel=POOL_KERNEL, scale=inputs.scale)


def _invariant(inputs: ScoreInputs) -> Explanation:
    assert inputs.queries is not None
    keys = inputs.keys[:, :].float()
    queries = inputs.queries.float().unflatten(0, (keys.shape[0], -1)).flatten(1, 2)  # [H, G n, D]
    candidates = keys[:, :-WINDOW]
    return Explanation(
        importance=invariant.importance(queries, candidates, invariant.POOL_KERNEL, inputs.scale),
        redundancy=invariant.redundancy(inputs.rotary_pairs.features(keys))[:, :-WINDOW],
    )
