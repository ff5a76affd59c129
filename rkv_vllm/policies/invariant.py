"""Important, and unlike the others wherever they stand (rkv_spec section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from rkv_vllm.kernels.naive_invariant import standard_scores
from rkv_vllm.policies.base import ScoreInputs
from rkv_vllm.settings.config import WINDOW, RkvConfig

#: Width of the max-pool over candidates' importance, in tokens.
POOL_KERNEL = 3


@dataclass(frozen=True)
class Invariant:
    """`weight` times the standard score of log-importance, less `1 - weight` times that of redundancy."""

    weight: float

    @classmethod
    def from_config(cls, config: RkvConfig, weight: float | None) -> Self:
        assert weight is not None, "the policy weighs importance against redundancy"
        return cls(weight)

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        """Returns: float32 [H, N - WINDOW] (rkv_spec 4.4).

        Raises: AssertionError where the queries are missing.
        """
        assert inputs.queries is not None, "policy invariant needs the newest queries, got None"
        heads = inputs.keys.shape[0]
        groups = inputs.queries.float().unflatten(0, (heads, -1))  # [H, G, n, D]
        # Head by head, so that logits take little memory.
        scores = [self._scores(inputs, head, groups[head]) for head in range(heads)]
        return torch.stack(scores)

    def _scores(self, inputs: ScoreInputs, head: int, queries: torch.Tensor) -> torch.Tensor:
        keys = inputs.keys[head : head + 1, :][0].float()  # [N, D]
        important = importance(queries.flatten(0, 1), keys[:-WINDOW], POOL_KERNEL, inputs.scale)
        redundant = redundancy(inputs.rotary_pairs.features(keys))[:-WINDOW]
        return joint_scores(important, redundant, self.weight)


def importance(
    queries: torch.Tensor, candidates: torch.Tensor, pool_kernel: int, scale: float
) -> torch.Tensor:
    """The mean attention of all queries to each candidate, max-pooled (rkv_spec 4.3).

    Args:
        queries: float32 [..., rows, D], of all query heads of a group.
        candidates: float32 [..., n, D], keys of their KV head.
        pool_kernel: odd width, in tokens, of the max-pooling.
        scale: factor on the logits.

    Returns:
        float32 [..., n].
    """
    attention = (queries @ candidates.transpose(-1, -2) * scale).softmax(dim=-1).mean(dim=-2)
    rows = attention.reshape(-1, attention.shape[-1])
    pooled = torch.nn.functional.max_pool1d(rows, pool_kernel, stride=1, padding=pool_kernel // 2)
    return pooled.view_as(attention)


def redundancy(features: torch.Tensor) -> torch.Tensor:
    """The mean cosine of each centred feature vector to all: to their mean direction (rkv_spec 4.2).

    In float64: that mean is small beside what it is the mean of.

    Args:
        features: [..., N, F].

    Returns:
        float32 [..., N].
    """
    units = features.double()
    units = units - units.mean(dim=-2, keepdim=True)
    units /= torch.linalg.vector_norm(units, dim=-1, keepdim=True) + 1e-8
    return (units @ units.mean(dim=-2).unsqueeze(-1)).squeeze(-1).float()


def joint_scores(important: torch.Tensor, redundant: torch.Tensor, weight: float) -> torch.Tensor:
    """[..., n], from importance and redundancy of the candidates (rkv_spec 4.4)."""
    log_importance = standard_scores((important + 1e-9).log())
    return weight * log_importance - (1.0 - weight) * standard_scores(redundant)
