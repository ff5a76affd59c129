"""The KV cache spec that puts a model's full-attention layers under rkv-vllm's block manager."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

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


def to_compacting_specs(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """The same layers under `CompactingSpec`.

    Raises: ValueError for a layer that is not plain full attention.
    """
    for layer, spec in specs.items():
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"rkv-vllm works with full attention only; layer {layer} has a {type(spec).__name__}"
            )
    return {
        layer: CompactingSpec(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
        for layer, spec in specs.items()
    }
