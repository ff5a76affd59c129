"""A request's pages over all KV cache groups: vLLM has one for each kind of layers, in one pool of pages.

Groups of full attention are compacted. All of them are shortened to the same counts in the same step, so that
a request holds as many pages in each. Groups of windows stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.scheduling.block_manager import CompactingManager, PageMove
from rkv_vllm.scheduling.other_groups import OtherGroups
from rkv_vllm.scheduling.prefix_cache import keep_out
from rkv_vllm.settings.config import RkvConfig


class PageGroups:
    """The pages of requests in the groups that are compacted, all together, and what the others hold.

    Attributes:
        page_size: tokens in a page of a compacted group.
        num_compacted: groups that are compacted.
        others: the groups that are not.
    """

    def __init__(
        self, coordinator: KVCacheCoordinator, compacted: Sequence[CompactingManager], others: OtherGroups
    ) -> None:
        self._coordinator = coordinator
        self._compacted = compacted
        self.num_compacted = len(compacted)
        self.page_size: int = compacted[0].block_size
        self.others = others

    # -- counts --------------------------------------------------------------------------------------------

    def pages(self, slots: int) -> int:
        """Pages that so many slots take, in all compacted groups."""
        return num_pages(slots, self.page_size) * self.num_compacted

    def whole_pages(self, slots: int) -> int:
        """Pages that so many slots fill, in all compacted groups."""
        return slots // self.page_size * self.num_compacted

    def num_pages(self, request_id: str) -> int:
        """Pages that a request holds, in all compacted groups."""
        return sum(manager.num_pages(request_id) for manager in self._compacted)

    def num_shared_pages(self, request_id: str) -> int:
        """See `CompactingManager.num_shared_pages`."""
        return sum(manager.num_shared_pages(request_id) for manager in self._compacted)

    def holders(self, blocks: Sequence[Sequence[KVCacheBlock]]) -> list[int]:
        """How many requests hold each page of a prefix, of compacted groups, that the prefix cache found.

        Args:
            blocks: of each of vLLM's groups.
        """
        return [page.ref_cnt for manager in self._compacted for page in blocks[manager.kv_cache_group_id]]

    def set_max_slots(self, request_id: str, max_slots: int) -> None:
        """See `CompactingManager.set_max_slots`."""
        for manager in self._compacted:
            manager.set_max_slots(request_id, max_slots)

    def forget_max_slots(self, request_id: str) -> None:
        for manager in self._compacted:
            manager.forget_max_slots(request_id)

    # -- rounds by token -----------------------------------------------------------------------------------

    def num_to_copy(self, request_id: str, keep: int) -> int:
        """See `CompactingManager.num_to_copy`."""
        return sum(manager.num_to_copy(request_id, keep) for manager in self._compacted)

    def can_compact(self, request_id: str, keep: int) -> bool:
        """Whether pages can be found for `keep` tokens, in all groups, without writing a shared page."""
        return self.num_to_copy(request_id, keep) <= self._coordinator.block_pool.get_num_free_blocks()

    def compact(self, request_id: str, keep: int, evicted: int, *, reserved: int) -> list[PageMove]:
        """Shortens a request to `keep` tokens in each group; see `CompactingManager.compact`."""
        to_copy = self.num_to_copy(request_id, keep)
        moves = []
        for manager in self._compacted:
            to_copy -= manager.num_to_copy(request_id, keep)  # what is left is for the groups to come
            moves.append(manager.compact(request_id, keep, evicted, reserved=reserved + to_copy))
        return moves

    def release(self, moves: Iterable[Sequence[PageMove]]) -> None:
        """Returns the pages that left to the pool, once all compactions of the step have their targets.

        Args:
            moves: of each round, a move a group.
        """
        for of_round in moves:
            for manager, move in zip(self._compacted, of_round, strict=True):
                manager.release([move])

    # -- rounds by page: of one group, since each would have to choose pages of its own ---------------------

    def stop_caching(self, request_id: str) -> None:
        """See `CompactingManager.stop_caching`."""
        self._only.stop_caching(request_id)

    def remove_pages(self, request_id: str, page_ids: Sequence[int]) -> None:
        """See `CompactingManager.remove_pages`."""
        self._only.remove_pages(request_id, page_ids)

    @property
    def _only(self) -> CompactingManager:
        (manager,) = self._compacted
        return manager

    # -- integrity -----------------------------------------------------------------------------------------

    def check_pages(self, request_id: str, slots: int, most_slots: int) -> None:
        """Raises: AssertionError where a request does not hold the pages of so many slots."""
        for manager in self._compacted:
            manager.check_pages(request_id, slots, most_slots)

    def check_integrity(self) -> None:
        """Raises: AssertionError where a page of the pool is neither free nor owned, or both."""
        pool = self._coordinator.block_pool
        owned = {
            page.block_id
            for manager in self._coordinator.single_type_managers
            for pages in manager.req_to_blocks.values()
            for page in pages
            if not page.is_null  # stands for a page that a window has left behind
        }
        free = pool.get_num_free_blocks()
        assert free + len(owned) + 1 == pool.num_gpu_blocks, (  # vLLM's null block is the one
            f"{free} free + {len(owned)} owned + 1 null is not {pool.num_gpu_blocks}"
        )


def page_groups(kv_cache_manager: KVCacheManager, vllm_config: VllmConfig, config: RkvConfig) -> PageGroups:
    """The groups that vLLM has made managers for.

    Raises: ValueError where none is compacted, one is of a kind that rkv-vllm does not know, or settings ask
    for one decision over several groups.
    """
    coordinator = kv_cache_manager.coordinator
    managers = coordinator.single_type_managers
    specs = [group.kv_cache_spec for group in kv_cache_manager.kv_cache_config.kv_cache_groups]
    compacted = [manager for manager in managers if isinstance(manager, CompactingManager)]
    others = [
        (manager, spec)
        for manager, spec in zip(managers, specs, strict=True)
        if isinstance(spec, SlidingWindowSpec | ChunkedLocalAttentionSpec)
    ]
    if not compacted or len(compacted) + len(others) != len(managers):
        raise ValueError(
            "rkv-vllm's scheduler needs full attention under its own block manager, and beside it windows "
            f"alone; found {[type(manager).__name__ for manager in managers]}: is rkv-vllm's worker selected "
            "too?"
        )
    if len(page_sizes := {manager.block_size for manager in compacted}) > 1:
        raise ValueError(
            f"layers of full attention have pages of {sorted(page_sizes)} tokens: they must be equally long"
        )
    if len(compacted) > 1 and (config.granularity == "page" or config.scope == "global"):
        raise ValueError(
            f"vLLM keeps this model's layers of full attention in {len(compacted)} groups, each with pages "
            "of its own: leave out --kv-granularity page and --kv-scope global"
        )
    if others:
        keep_out(coordinator, compacted[0].compacted)
    batches = vllm_config.max_concurrent_batches
    return PageGroups(
        coordinator,
        compacted,
        OtherGroups(
            [manager for manager, _ in others],
            [spec for _, spec in others],
            max_model_len=vllm_config.model_config.max_model_len,
            tokens_in_flight=batches * (1 + vllm_config.num_speculative_tokens),
            prompt_tokens_in_flight=vllm_config.max_in_flight_tokens,
        ),
    )
