"""KeyDiff: keys that differ from the mean key (arXiv 2504.15364); R-KV's redundancy without the link cut."""

from __future__ import annotations

import torch

from rkv_vllm.policies.base import ScoreInputs


class KeyDiff:
    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        directions = torch.nn.functional.normalize(inputs.keys.float(), dim=-1)
        mean = directions.mean(dim=1).unsqueeze(-1)
        return -(directions[:, : inputs.num_candidates] @ mean).squeeze(-1)
