"""How a loaded model rotates its keys."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import (
    Phi3LongRoPEScaledRotaryEmbedding,
)

from rkv_vllm.kernels.rotary_pairs import UNROTATED, RotaryPairs


def rotary_pairs(model: nn.Module, layers: Sequence[Attention]) -> RotaryPairs:
    """What the model's rotary embeddings say; of several kinds the one of most layers.

    vLLM's own models have one beside each attention layer, those that it takes from transformers one for all.
    Layers without one, as some models have between others, are not counted: of their keys the pairs are
    features like any others.
    """
    kinds = Counter(_beside_layers(model, layers)) or Counter(_of_transformers(model))
    return kinds.most_common(1)[0][0] if kinds else UNROTATED


def _beside_layers(model: nn.Module, layers: Sequence[Attention]) -> Iterator[RotaryPairs]:
    own = set(layers)
    for module in model.modules():
        children = list(module.children())
        if own.isdisjoint(children):
            continue
        for child in children:
            match child:
                case RotaryEmbeddingBase():
                    yield RotaryPairs(child.rotary_dim, interleaved=not child.is_neox_style)
                case Phi3LongRoPEScaledRotaryEmbedding():  # of no common base; it takes halves alone
                    yield RotaryPairs(child.rotary_dim)


def _of_transformers(model: nn.Module) -> Iterator[RotaryPairs]:
    """One frequency a pair; which dimensions make one is in a function of the model's own file."""
    for module in model.modules():
        file = type(module).__module__
        buffers = dict(module.named_buffers(recurse=False))
        # Where windows are rotated otherwise than full attention, both have frequencies in one module.
        frequencies = buffers.get("inv_freq", buffers.get("full_attention_inv_freq"))
        if frequencies is None or not file.startswith("transformers.models."):
            continue
        rotate_half = vars(sys.modules[file]).get("rotate_half")
        # (0, 1, 2, 3) becomes (-2, -3, 0, 1), or (-1, 0, -3, 2) where neighbours are rotated together.
        interleaved = rotate_half is not None and int(rotate_half(torch.arange(4))[0]) == -1
        yield RotaryPairs(2 * frequencies.numel(), interleaved)
