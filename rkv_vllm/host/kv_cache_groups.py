"""The KV cache groups that vLLM will make of a model with windows, from its config alone."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from rkv_vllm.host.cache_dtype import cache_dtype
from rkv_vllm.host.model_layers import FULL, kinds_of_layers, layer_field

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec


def planned_groups(vllm_config: VllmConfig, page_size: int) -> list[KVCacheGroupSpec]:
    """Those of the first device.

    Args:
        vllm_config: of a model whose config names the kind of each layer.
        page_size: tokens in a page of full attention.
    """
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

    from rkv_vllm.host.kv_cache_spec import CompactingSpec
    from rkv_vllm.host.moved import get_kv_cache_groups

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = kv_cache_dtype_str_to_dtype(cache_dtype(vllm_config), model)
    first, end = model.get_layers_start_end_indices(parallel)
    specs: dict[str, KVCacheSpec] = {}
    for layer, kind in list(enumerate(kinds_of_layers(model)))[first:end]:
        heads = layer_field(model, "num_key_value_heads", layer) or model.get_total_num_kv_heads()
        common = {
            "block_size": page_size,
            "num_kv_heads": max(heads // parallel.tensor_parallel_size, 1),
            "head_size": layer_field(model, "head_dim", layer) or model.get_head_size(),
            "dtype": dtype,
        }
        if kind == FULL:
            specs[str(layer)] = CompactingSpec(**common)
        elif kind == "sliding_attention":
            specs[str(layer)] = SlidingWindowSpec(sliding_window=model.get_sliding_window(), **common)
        else:
            size = model.attention_chunk_size
            specs[str(layer)] = ChunkedLocalAttentionSpec(attention_chunk_size=size, **common)
    # Attention backends choose the layout when the model is loaded. Where layers lie apart in memory, as they
    # do in the one that most of them prefer, it has no say in the groups.
    planned = copy(vllm_config)
    planned.cache_config = copy(vllm_config.cache_config)
    planned.cache_config.kv_cache_layout = "LBNHC"
    groups: list[KVCacheGroupSpec] = get_kv_cache_groups(planned, specs)
    return groups
