"""Important, and unlike the others wherever they stand (rkv_spec section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

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
        log_importance = (_importance(queries, keys[:-WINDOW], inputs.scale) + 1e-9).log()
        redundancy = _redundancy(inputs.rotary_pairs.features(keys))[:-WINDOW]
        return self.weight * _standard(log_importance) - (1.0 - self.weight) * _standard(redundancy)


def _importance(queries: torch.Tensor, candidates: torch.Tensor, scale: float) -> torch.Tensor:
    """[n], the mean over all queries [G, rows, D] of the attention to each candidate [n, D], max-pooled."""
    logits = queries.flatten(0, 1) @ candidates.T * scale
    attention = logits.softmax(dim=-1).mean(dim=0)
    pooled = torch.nn.functional.max_pool1d(attention[None], POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)
    return pooled[0]


def _redundancy(features: torch.Tensor) -> torch.Tensor:
    """[N], the mean cosine of each centred feature vector [N, F] to all: to their mean direction.

    In float64: that mean is small beside what it is the mean of.
    """
    units = features.double()
    units -= units.mean(dim=0)
    units /= torch.linalg.vector_norm(units, dim=-1, keepdim=True) + 1e-8
    return (units @ units.mean(dim=0)).float()


def _standard(values: torch.Tensor) -> torch.Tensor:
    centred = values - values.mean()
    return centred / (centred.square().mean().sqrt() + 1e-6)
