"""The attention layers of a loaded model."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.host.compatibility import refuse_unsupported_layers


def attention_layers(vllm_config: VllmConfig) -> list[Attention]:
    """In the order of the model.

    Raises: ValueError that lists every kind of layer that cannot be compacted.
    """
    layers = {
        name: layer
        for name, layer in vllm_config.compilation_config.static_forward_context.items()
        if isinstance(layer, Attention)
    }
    refuse_unsupported_layers(layers)
    return list(layers.values())
