"""Which of a model's layers are compacted, and which of them share pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig

from rkv_vllm.host.compatibility import refuse_unsupported_layers
from rkv_vllm.host.kv_cache_spec import has_compacting_spec, is_compactable


@dataclass(frozen=True)
class LayerGroup:
    """Compacted layers that share pages: those of one KV cache group.

    Attributes:
        group_id: vLLM's number of the KV cache group.
        place: of its pages in messages, which have those of compacted groups alone.
        layers: its layers on this device, as indices into all that are compacted.
    """

    group_id: int
    place: int
    layers: tuple[int, ...]


def compacted_layers(vllm_config: VllmConfig) -> list[Attention]:
    """Layers of a loaded model whose caches are compacted, in the order of the model.

    Layers that read another one's cache are not among them: they find there what that one has kept.

    Raises: ValueError that lists every kind of layer that cannot be compacted.
    """
    layers = {
        name: layer
        for name, layer in vllm_config.compilation_config.static_forward_context.items()
        if isinstance(layer, Attention)
    }
    compacted = {
        name: layer
        for name, layer in layers.items()
        if layer.kv_sharing_target_layer_name is None and is_compactable(layer.get_kv_cache_spec(vllm_config))
    }
    refuse_unsupported_layers(compacted)
    return list(compacted.values())


def layer_groups(kv_cache_config: KVCacheConfig, layers: Sequence[Attention]) -> list[LayerGroup]:
    """The KV cache groups that are compacted, in vLLM's order.

    Args:
        kv_cache_config: of this worker.
        layers: that are compacted.

    Raises: ValueError where this pipeline stage has no layer of some group.
    """
    index = {layer.layer_name: place for place, layer in enumerate(layers)}
    compacted = [
        (group_id, group)
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
        if has_compacting_spec(group.kv_cache_spec)
    ]
    groups = [
        LayerGroup(group_id, place, tuple(sorted(index[name] for name in group.layer_names if name in index)))
        for place, (group_id, group) in enumerate(compacted)
    ]
    if not all(group.layers for group in groups):
        raise ValueError(
            "a pipeline stage has no layer of one of the model's groups of full attention: choose a smaller "
            "--pipeline-parallel-size"
        )
    return groups
