"""How a loaded model rotates its keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import (
    Phi3LongRoPEScaledRotaryEmbedding,
)

from rkv_vllm.kernels.rotary_pairs import UNROTATED, RotaryPairs


def rotary_pairs(model: nn.Module, layers: Sequence[Attention]) -> RotaryPairs:
    """What the rotary embeddings beside the attention layers say; of several kinds the one of most layers.

    Layers without one, as some models have between others, are not counted: of their keys the pairs are
    features like any others.
    """
    own = set(layers)
    kinds = Counter(
        pairs
        for module in model.modules()
        if own.intersection(module.children())
        for child in module.children()
        if (pairs := _pairs_of(child)) is not None
    )
    return kinds.most_common(1)[0][0] if kinds else UNROTATED


def _pairs_of(module: nn.Module) -> RotaryPairs | None:
    match module:
        case RotaryEmbeddingBase():
            return RotaryPairs(module.rotary_dim, interleaved=not module.is_neox_style)
        case Phi3LongRoPEScaledRotaryEmbedding():  # of no common base; it takes halves alone
            return RotaryPairs(module.rotary_dim)
    return None
