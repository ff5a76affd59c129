"""The KV cache pool of a configuration: what a token takes, and how much was given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rkv_vllm.decisions.auto_lengths import make_request_lengths
from rkv_vllm.decisions.sizing import KvShape, PageKinds, Pool, WindowPages
from rkv_vllm.host.cache_dtype import cache_dtype
from rkv_vllm.host.kv_cache_groups import planned_groups
from rkv_vllm.host.model_layers import has_windows
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.values import AUTO

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Tokens in a page on a CPU, unless another size is chosen.
CPU_PAGE_SIZE = 128
#: Sets the pool on a CPU, in GiB, and goes there before the option for bytes.
CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class GivenPool:
    """A pool that options or the environment give.

    Attributes:
        size_bytes: on one device; None: it was given in pages.
        source: the option or variable that gave it.
    """

    pool: Pool
    size_bytes: int | None
    source: str


def kv_shape(vllm_config: VllmConfig) -> KvShape:
    """What one token leaves on the first device."""
    from vllm.utils.torch_utils import get_dtype_size, kv_cache_dtype_str_to_dtype

    from rkv_vllm.host.kv_cache_spec import has_compacting_spec

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    element_bytes = get_dtype_size(kv_cache_dtype_str_to_dtype(cache_dtype(vllm_config), model))
    if not has_windows(model):
        layers, heads = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
        return KvShape(layers, heads, model.get_head_size(), element_bytes)
    groups = planned_groups(vllm_config, page_size(vllm_config))
    spec = next(group.kv_cache_spec for group in groups if has_compacting_spec(group.kv_cache_spec))
    layers = max(len(group.layer_names) for group in groups)
    return KvShape(layers, spec.num_kv_heads, spec.head_size, element_bytes)


def page_kinds(vllm_config: VllmConfig) -> PageKinds:
    """Which pages requests hold on the first device."""
    from rkv_vllm.host.kv_cache_spec import has_compacting_spec

    if not has_windows(vllm_config.model_config):
        return PageKinds()
    specs = [group.kv_cache_spec for group in planned_groups(vllm_config, page_size(vllm_config))]
    most_len, batches = vllm_config.model_config.max_model_len, vllm_config.max_concurrent_batches
    windows = [spec for spec in specs if not has_compacting_spec(spec)]
    return PageKinds(
        compacted=len(specs) - len(windows),
        windows=tuple(
            WindowPages(
                page_size=spec.block_size,
                most=spec.max_admission_blocks_per_request(batches, most_len),
                most_in_prompt=spec.max_admission_blocks_per_request(
                    vllm_config.max_in_flight_tokens, most_len
                ),
            )
            for spec in windows
        ),
    )


def page_size(vllm_config: VllmConfig) -> int:
    """Tokens in a page; on a CPU vLLM says so from release 0.33 on only when it has loaded the model."""
    cache = vllm_config.cache_config
    if vllm_config.device_config.device_type == "cpu" and not cache.user_specified_block_size:
        return CPU_PAGE_SIZE
    return cache.block_size


def given_pool(vllm_config: VllmConfig) -> GivenPool | None:
    """The pool that was given; None where vLLM measures what is left of the memory."""
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        pool = Pool(cache.num_gpu_blocks_override, page_size(vllm_config), page_kinds(vllm_config))
        return GivenPool(pool, None, "--num-gpu-blocks-override")
    if cache.kv_cache_memory_bytes is None:
        return None
    per_token = kv_shape(vllm_config).bytes_per_token
    size, kinds = page_size(vllm_config), page_kinds(vllm_config)
    pool = Pool.of_bytes(cache.kv_cache_memory_bytes, size, per_token, kinds)
    by_variable = vllm_config.device_config.device_type == "cpu" and os.environ.get(CPU_SPACE)
    source = CPU_SPACE if by_variable else "--kv-cache-memory-bytes"
    return GivenPool(pool, cache.kv_cache_memory_bytes, source)


def slots_beyond_pool(config: RkvConfig, max_model_len: int, page_size: int) -> int | None:
    """Slots, in tokens, that a pool has to hold where max_model_len may exceed it: those of a request at its
    default budget. None where it may not: a full cache of max_model_len has to fit."""
    default = config.resolve_default(max_model_len) if config.beyond_pool else None
    if default is None:
        return None
    return make_request_lengths(config.granularity, 0, default, page_size).needed_slots


def pool_problems(vllm_config: VllmConfig) -> list[str]:
    """What vLLM will find wrong with the pool that was given, one line; empty where nothing is, or where the
    pool is known only when the weights are loaded."""
    given = given_pool(vllm_config)
    model = vllm_config.model_config
    if given is None or model.original_max_model_len == -1:  # vLLM fits the length to the pool then
        return []
    pool, config = given.pool, RkvConfig.from_additional_config(vllm_config.additional_config)
    tokens, what = model.max_model_len, f"a request of max_model_len ({model.max_model_len:,} tokens)"
    least = slots_beyond_pool(config, model.max_model_len, pool.page_size)
    if least is not None and least < tokens:
        tokens, what = least, f"a request at the default budget ({least:,} tokens with its buffer)"
    needed = pool.pages_to_start(tokens, model.max_model_len)
    if needed <= pool.usable_pages:
        return []
    return [
        f"the pool is too small: {what} takes {needed:,} pages of {pool.page_size}, and "
        f"requests can hold {pool.usable_pages:,} ({given.source}, one page less); "
        f"{too_small_remedy(config, pool, given.source)}"
    ]


def too_small_remedy(config: RkvConfig, pool: Pool | None = None, memory: str | None = None) -> str:
    """What to do about a pool that is too small.

    Args:
        pool: where it is known.
        memory: what gave its size; None: vLLM measured the memory.
    """
    more = f"a larger {memory}" if memory else "a larger --gpu-memory-utilization"
    if config.beyond_pool:
        budget = "--kv-min-budget" if config.budget == AUTO else "--kv-budget"
        return f"give a smaller {budget} or --kv-buffer, or {more}"
    budget = " with a default --kv-budget" if config.budget is None else ""
    held = 0 if pool is None else pool.usable_pages * pool.page_size
    length = f"a --max-model-len of at most {held}" if held else "a smaller --max-model-len"
    return f"give --kv-beyond-pool{budget}, which refuses only requests that cannot fit, {length}, or {more}"
