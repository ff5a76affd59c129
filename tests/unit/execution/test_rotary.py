"""How a model's keys are rotated, read off what stands beside its attention layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from rkv_vllm.execution.rotary import rotary_pairs
from rkv_vllm.kernels.rotary_pairs import UNROTATED, RotaryPairs


class Block(nn.Module):
    """A model's own attention module: vLLM's layer, and a rotary embedding or none."""

    def __init__(self, rotary: nn.Module | None) -> None:
        super().__init__()
        self.rotary_emb = rotary
        self.attn = nn.Identity()


def rope(share: float = 1.0, neox: bool = True, **parameters: object) -> nn.Module:
    parameters = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": share} | parameters
    config: Any = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=4096)
    with set_current_vllm_config(config):
        found: nn.Module = get_rope(64, 4096, is_neox_style=neox, rope_parameters=parameters)
    return found


LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 32,
    "long_factor": [2.0] * 32,
    "original_max_position_embeddings": 2048,
}
WHOLE = RotaryPairs(64)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([rope(), rope()], WHOLE),
        ([rope(0.5)], RotaryPairs(32)),
        ([rope(0.5, neox=False)], RotaryPairs(32, interleaved=True)),
        ([rope(**LONG)], WHOLE),
        ([rope(), None, rope()], WHOLE),  # some layers are not rotated
        ([rope(0.5), rope(), rope()], WHOLE),
        ([None], UNROTATED),
    ],
    ids=["Llama", "part", "neighbours", "long", "some layers", "two kinds", "none"],
)
def test_the_pairs_of_a_model(kinds: list[nn.Module | None], expected: RotaryPairs) -> None:
    """Proves that what is rotated, and how, is read from the loaded modules of text layers alone."""
    blocks = [Block(rotary) for rotary in kinds]
    vision = Block(rope(neox=False))  # of no layer that is compacted
    layers: Any = [block.attn for block in blocks]
    assert rotary_pairs(nn.ModuleList([vision, *blocks]), layers) == expected
