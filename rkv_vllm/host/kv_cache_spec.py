"""The KV cache spec that puts layers of full attention under rkv-vllm's block manager."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.host.pool import slots_beyond_pool
from rkv_vllm.settings.config import RkvConfig


@dataclass(frozen=True, kw_only=True)
class CompactingSpec(FullAttentionSpec):
    """A full-attention layer whose pages are managed by `CompactingManager`; no field of its own."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of this layer that a request holds at most.

        vLLM asks twice. Before the pool has its size: what must fit, or it refuses to start. That is a full
        cache of max_model_len, unless the server lets max_model_len exceed the pool: then it is a request at
        its default budget, and the scheduler refuses those that do not fit. Afterwards, to say how many
        tokens the pool holds: always the full cache, which the answer is reckoned from.
        """
        whole = super().max_memory_usage_bytes(vllm_config)
        if vllm_config.cache_config.num_gpu_blocks is not None:
            return whole
        config = RkvConfig.from_additional_config(vllm_config.additional_config)
        slots = slots_beyond_pool(config, vllm_config.model_config.max_model_len, self.block_size)
        if slots is None:
            return whole
        return min(whole, num_pages(slots, self.block_size) * self.page_size_bytes)


def is_compactable(spec: KVCacheSpec | None) -> bool:
    """Whether a layer is plain full attention: it has a row for each token, and sees all of them."""
    return (
        spec is not None
        and type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
    )


def has_compacting_spec(spec: KVCacheSpec) -> bool:
    """Whether the spec of a KV cache group is that of layers that are compacted."""
    if isinstance(spec, UniformTypeKVCacheSpecs):  # layers of one kind and several shapes
        return all(map(has_compacting_spec, spec.kv_cache_specs.values()))
    return isinstance(spec, CompactingSpec)


def to_compacting_specs(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """The same layers, those of full attention under `CompactingSpec`; windows stay as they are.

    Raises: ValueError for a layer of another kind, or where no layer is one of full attention.
    """
    for layer, spec in specs.items():
        if not is_compactable(spec) and type(spec) not in (SlidingWindowSpec, ChunkedLocalAttentionSpec):
            raise ValueError(
                f"rkv-vllm works with full attention, and windows beside it; layer {layer} has a "
                f"{type(spec).__name__}"
            )
    if specs and not any(map(is_compactable, specs.values())):
        raise ValueError("rkv-vllm needs layers of full attention; all of this model's have windows")
    return {layer: _compacting(spec) if is_compactable(spec) else spec for layer, spec in specs.items()}


def _compacting(spec: KVCacheSpec) -> CompactingSpec:
    return CompactingSpec(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
