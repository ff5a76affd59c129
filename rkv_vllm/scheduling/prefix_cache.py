"""vLLM's prefix cache over all KV cache groups, where some of them are compacted."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from rkv_vllm.host.retype import override


def keep_out(coordinator: KVCacheCoordinator, compacted: Container[str]) -> None:
    """Caches no page of a request from its first round on, in no group.

    What is computed afterwards follows from an approximation: keys of a window, too, are then others than
    those that its tokens' hash stands for. A group that is compacted sees to it by itself.

    Args:
        coordinator: vLLM's, which has no hook for it.
        compacted: ids of the requests that were compacted since they last started, kept up to date.
    """
    coordinator_class = type(coordinator)

    def cache_blocks(self: Any, request: Request, num_computed_tokens: int) -> None:
        if request.request_id not in compacted:
            coordinator_class.cache_blocks(self, request, num_computed_tokens)

    override(coordinator, "Isolating", cache_blocks=cache_blocks)


def shorter_hit(kv_cache_manager: KVCacheManager, request: Request, most: int) -> tuple[KVCacheBlocks, int]:
    """Pages and tokens that the prefix cache has of a request, at most so many.

    They are looked up anew: what a group of windows has for a longer prefix is not what it needs for a
    shorter one.
    """
    coordinator = kv_cache_manager.coordinator
    found, num_tokens, _ = coordinator.find_longest_cache_hit(request.block_hashes, most)
    return kv_cache_manager.create_kv_cache_blocks(found), num_tokens
