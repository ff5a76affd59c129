"""The first tokens and the newest ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import torch

from rkv_vllm.policies.base import ScoreInputs

#: First tokens, which take the attention that has nowhere to go.
SINKS = 4


class Recency:
    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        # Survivors stay in temporal order, so that a slot's index tells its age.
        scores = torch.arange(inputs.num_candidates, dtype=torch.float32, device=inputs.keys.device)
        scores[:SINKS] = torch.inf
        return scores.expand(inputs.keys.shape[0], -1)
