"""What a model's config says of its attention layers, read as vLLM's own models read it.

A config need not say everything: the loaded layers are checked again (`refuse_unsupported_layers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

#: A layer that sees the whole text.
FULL = "full_attention"
#: Fields that may differ by layer, in a list or in `per_layer_config`.
HEADS = ("num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim")


def has_windows(model: ModelConfig) -> bool:
    """Whether some layer sees only a window, or a chunk, of the text."""
    return any(kind != FULL for kind in kinds_of_layers(model))


def has_only_windows(model: ModelConfig) -> bool:
    """Whether no layer sees the whole text."""
    return FULL not in kinds_of_layers(model)


def kinds_of_layers(model: ModelConfig) -> list[str]:
    """What each layer that has a cache of its own sees: `FULL`, "sliding_attention" or "chunked_attention".

    vLLM clears `sliding_window` where a checkpoint has one and does not use it, and for
    `--disable-sliding-window`. What is left holds for all layers, or for those that `layer_types` names.
    """
    config = _config(model)
    # Some configs have another name for it; then all layers are alike, and one stands for them.
    count = config.get("num_hidden_layers") or 1
    window = bool(model.get_sliding_window())
    types = config.get("layer_types") or ["sliding_attention" if window else FULL] * count
    kept = {"sliding_attention": window, "chunked_attention": model.attention_chunk_size is not None}
    own = types[: len(types) - (config.get("num_kv_shared_layers") or 0)]
    return [kind if kept.get(kind) else FULL for kind in own]


def layer_field(model: ModelConfig, name: str, layer: int) -> Any:
    """What the config says of one layer, or of all; None: nothing."""
    config = _config(model)
    of_layer = (config.get("per_layer_config") or {}).get(str(layer), {})
    return of_layer.get(name, config.get(name))


def has_unequal_heads(model: ModelConfig) -> bool:
    """Whether layers of full attention differ in the number or the size of their heads."""
    return any(len(set(shapes)) > 1 for shapes in _heads_by_layer(model))


def _heads_by_layer(model: ModelConfig) -> Iterator[list[Any]]:
    """What is said of heads by layer of full attention; each list has one kind of number."""
    config = _config(model)
    full = [layer for layer, kind in enumerate(kinds_of_layers(model)) if kind == FULL]
    for name in HEADS:
        for written in (config.get(name), config.get(f"{name}_per_layer")):
            if isinstance(written, list):
                yield [written[layer] for layer in full if layer < len(written)]
        if not isinstance(config.get(name), list):
            yield [layer_field(model, name, layer) for layer in full]
    if "DeciLMForCausalLM" in model.architectures:  # Nemotron made by neural architecture search
        attention = [block.attention for block in model.hf_text_config.block_configs]
        yield [layer.n_heads_in_group for layer in attention if not layer.no_op]


def _config(model: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = model.hf_text_config.to_dict()
    return fields
