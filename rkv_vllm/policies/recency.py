"""The first tokens and the newest ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rkv_vllm.policies.base import ScoreInputs
from rkv_vllm.settings.config import WINDOW, Order

#: First tokens, which take the attention that has nowhere to go.
SINKS = 4


@dataclass(frozen=True)
class Recency:
    order: Order = "temporal"

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        # A slot's index tells its age, but where an earlier round has laid the newest first behind the sinks.
        scores = torch.arange(inputs.num_candidates, dtype=torch.float32, device=inputs.keys.device)
        if self.order == "score" and inputs.num_previous_survivors:
            previous = slice(SINKS, inputs.num_previous_survivors - WINDOW)
            scores[previous] = scores[previous].flip(0)
        scores[:SINKS] = torch.inf
        return scores.expand(inputs.keys.shape[0], -1)
