"""What a model's config says of its attention layers, read as vLLM's own models read it.

A config need not say everything: the loaded layers are checked again (`refuse_unsupported_layers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

#: Fields that may differ by layer, in a list or in `per_layer_config`.
HEADS = ("num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim")


def has_windows(model: ModelConfig) -> bool:
    """Whether some layer sees only a window.

    vLLM clears `sliding_window` where a checkpoint has one and does not use it, and for
    `--disable-sliding-window`. What is left holds for all layers, or for those that `layer_types` names.
    """
    types = _config(model).get("layer_types")
    return bool(model.get_sliding_window()) and (types is None or "sliding_attention" in types)


def shares_caches(model: ModelConfig) -> bool:
    """Whether layers read the cache of another one."""
    return bool(_config(model).get("num_kv_shared_layers"))


def has_unequal_heads(model: ModelConfig) -> bool:
    """Whether layers differ in the number or the size of their heads."""
    return any(len(set(shapes)) > 1 for shapes in _heads_by_layer(model))


def _heads_by_layer(model: ModelConfig) -> Iterator[list[Any]]:
    """What is said of heads by layer; each list has one kind of number, a layer's at each place."""
    config = _config(model)
    for name in HEADS:
        for written in (config.get(name), config.get(f"{name}_per_layer")):
            if isinstance(written, list):
                yield written
    layers = config.get("per_layer_config") or {}
    for name in HEADS:
        others = [layer.get(name, config.get(name)) for layer in layers.values()]
        yield others if len(others) == config.get("num_hidden_layers") else [config.get(name), *others]
    if "DeciLMForCausalLM" in model.architectures:  # Nemotron made by neural architecture search
        attention = [block.attention for block in model.hf_text_config.block_configs]
        yield [layer.n_heads_in_group for layer in attention if not layer.no_op]


def _config(model: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = model.hf_text_config.to_dict()
    return fields
