"""Any tokens, chosen per layer and KV head: what a policy has to beat."""

from __future__ import annotations

from typing import Self

import torch

from rkv_vllm.policies.base import ScoreInputs
from rkv_vllm.settings.config import RkvConfig


class Random:
    """Draws by layer and length of the request, so that a replayed compaction chooses the same tokens."""

    @classmethod
    def from_config(cls, config: RkvConfig, weight: float | None) -> Self:
        return cls()

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        """Returns: float32 [H, N - WINDOW], uniform in 0 to 1."""
        device = inputs.keys.device
        generator = torch.Generator(device).manual_seed(inputs.logical_length << 16 | inputs.layer)
        return torch.rand(inputs.keys.shape[0], inputs.num_candidates, generator=generator, device=device)
