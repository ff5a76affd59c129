"""Any tokens, chosen per layer and KV head: what a policy has to beat."""

from __future__ import annotations

import torch

from rkv_vllm.policies.base import ScoreInputs


class Random:
    """Draws by layer and length of the request, so that a replayed compaction chooses the same tokens."""

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        device = inputs.keys.device
        generator = torch.Generator(device).manual_seed(inputs.logical_length << 16 | inputs.layer)
        return torch.rand(inputs.keys.shape[0], inputs.num_candidates, generator=generator, device=device)
