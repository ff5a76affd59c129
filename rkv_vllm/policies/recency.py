"""The first tokens and the newest ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from rkv_vllm.policies.base import ScoreInputs
from rkv_vllm.settings.config import WINDOW, Order, RkvConfig

#: First tokens: attention sinks (StreamingLLM, section 3).
SINKS = 4


@dataclass(frozen=True)
class Recency:
    """Scores by age.

    Attributes:
        order: how survivors of an earlier round lie in the cache.
    """

    order: Order = "temporal"

    @classmethod
    def from_config(cls, config: RkvConfig, weight: float | None) -> Self:
        return cls(config.order)

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        """Returns: float32 [H, N - WINDOW]: infinite for the sinks, else higher for newer tokens."""
        # A slot's index tells its age, but where an earlier round has laid the newest first behind those that
        # always stay.
        scores = torch.arange(inputs.num_candidates, dtype=torch.float32, device=inputs.keys.device)
        if self.order == "score" and inputs.num_previous_survivors:
            always = max(SINKS, inputs.protected)
            previous = slice(always, inputs.num_previous_survivors - WINDOW)
            scores[previous] = scores[previous].flip(0)
        scores[:SINKS] = torch.inf
        return scores.expand(inputs.keys.shape[0], -1)
