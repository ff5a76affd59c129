"""KeyDiff: keys that differ from the mean key (arXiv 2504.15364); R-KV's redundancy without the link cut."""

from __future__ import annotations

from typing import Self

import torch

from rkv_vllm.policies.base import ScoreInputs
from rkv_vllm.settings.config import RkvConfig


class KeyDiff:
    """Keeps the keys that point away from the mean direction of all keys."""

    @classmethod
    def from_config(cls, config: RkvConfig, weight: float | None) -> Self:
        return cls()

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        """Returns: float32 [H, N - WINDOW], minus the cosine of each key and the mean direction."""
        total = sum(_directions(keys).sum(dim=1) for keys in inputs.key_blocks())
        mean = (total / inputs.keys.shape[1]).unsqueeze(-1)  # [H, D, 1]
        scores = [-(_directions(keys) @ mean).squeeze(-1) for keys in inputs.key_blocks()]
        return torch.cat(scores, dim=1)[:, : inputs.num_candidates]


def _directions(keys: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(keys.float(), dim=-1)
