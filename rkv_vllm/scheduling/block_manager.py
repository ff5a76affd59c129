"""vLLM's block manager for full attention, able to shorten a running request (glue to vLLM's block pool)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from rkv_vllm.host.kv_cache_spec import CompactingSpec


@dataclass(frozen=True, slots=True)
class PageMove:
    """What a compaction does to a request's pages.

    Attributes:
        source_pages, target_pages: ids of its pages before and afterwards, in order.
        freed: source pages that are no targets, still to be released.
    """

    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]
    freed: tuple[KVCacheBlock, ...]


class CompactingManager(FullAttentionManager):
    """Keeps `len(pages) == ceil(physical length / page size)` for every request.

    vLLM counts tokens logically everywhere; this class alone subtracts what was evicted. Pages leave a
    running request by shortening its list, so that vLLM's pool, prefix cache and metrics stay as they are.

    Where whole pages are evicted, what counts as evicted here is what was reported to have left: until then
    the list is longer by the pages that are leaving.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._evicted: dict[str, int] = {}
        self._max_slots: dict[str, int] = {}

    @property
    def compacted(self) -> KeysView[str]:
        """Requests that were compacted since they last started from nothing."""
        return self._evicted.keys()

    # -- the request's pages -------------------------------------------------------------------------------

    def set_max_slots(self, request_id: str, max_slots: int) -> None:
        """Tells vLLM's admission how many slots, in tokens, the request can ever hold."""
        self._max_slots[request_id] = max_slots

    def forget_max_slots(self, request_id: str) -> None:
        """Forgets them, when the request is gone."""
        self._max_slots.pop(request_id, None)

    def num_pages(self, request_id: str) -> int:
        return len(self.req_to_blocks.get(request_id, ()))

    def num_shared_pages(self, request_id: str) -> int:
        """Pages of a request never compacted that others hold too.

        They are its first ones: who shares a page of a prefix shares all pages before it, until a round
        replaces them. (Where whole pages are evicted some may stay behind: then it is an estimate.)
        """
        pages = self.req_to_blocks[request_id]
        if not pages or pages[0].ref_cnt == 1:
            return 0
        return bisect_left(pages, True, key=lambda page: page.ref_cnt == 1)

    def num_to_copy(self, request_id: str, keep: int) -> int:
        """Pages that a compaction to `keep` tokens takes from the pool at least: instead of shared ones."""
        head, tail = self._split(request_id, keep)
        return max(self._num_shared(head) - (len(tail) - self._num_shared(tail)), 0)

    def can_compact(self, request_id: str, keep: int) -> bool:
        """Whether pages can be found for `keep` tokens without writing a shared page."""
        return self.num_to_copy(request_id, keep) <= self.block_pool.get_num_free_blocks()

    def compact(self, request_id: str, keep: int, evicted: int, *, reserved: int) -> PageMove:
        """Shortens a request to `keep` tokens; the caller releases the pages that leave.

        Mutates the request's page list, the free queue and, where the pool has no room, the prefix cache. A
        page that another request shares is left alone and replaced; so is one in the prefix cache while the
        pool has room, and once released it is free with its content still to be hit. Replacements are, in
        this order, the request's own private pages that it no longer needs, and pages of the pool. Where
        those run out, cached pages that only this request holds lose their cache entries: one that it no
        longer needs replaces a shared page, and others are reused in place.

        Args:
            request_id: a running request for which `can_compact` holds.
            keep: physical length afterwards, in tokens.
            evicted: tokens evicted so far, this round included.
            reserved: pages of the pool that other rounds of this step need instead of shared ones.
        """
        pool = self.block_pool
        # before:  [ 0, ceil(keep / page) )            head: will hold the survivors
        #          [ ceil(keep / page), len(before) )  tail: emptied; the private ones of it are spare
        before = self.req_to_blocks[request_id]
        head, tail = self._split(request_id, keep)
        spare = [page for page in tail if pool.is_block_writable(page)]
        cached_spare = [page for page in tail if page.ref_cnt == 1 and not pool.is_block_writable(page)]
        in_pool = pool.get_num_free_blocks() - reserved
        shared_to_come = self._num_shared(head)

        after: list[KVCacheBlock] = []
        for page in head:
            if pool.is_block_writable(page):
                after.append(page)
                continue
            is_shared = page.ref_cnt > 1
            shared_to_come -= is_shared
            # What remains after this page must still do for the shared pages to come.
            if spare and (is_shared or len(spare) + in_pool > shared_to_come):
                after.append(spare.pop(0))
            elif in_pool > (0 if is_shared else shared_to_come) or (is_shared and not cached_spare):
                after.extend(pool.get_new_blocks(1))
                in_pool -= 1
            else:
                target = cached_spare.pop(0) if is_shared else page
                pool.evict_blocks({target.block_id})
                after.append(target)

        kept = {page.block_id for page in after}
        self.req_to_blocks[request_id] = after
        self._evicted[request_id] = evicted
        return PageMove(
            source_pages=tuple(page.block_id for page in before),
            target_pages=tuple(page.block_id for page in after),
            freed=tuple(page for page in before if page.block_id not in kept),
        )

    def release(self, moves: Iterable[PageMove]) -> None:
        """Returns the pages that left to the pool, once all compactions of the step have their targets.

        A step's compactions run side by side on the device: a page that one still reads must not be the
        target of another.
        """
        for move in moves:
            self.block_pool.free_blocks(reversed(move.freed))

    def stop_caching(self, request_id: str) -> None:
        """Keeps the request's further pages out of the prefix cache: pages before them are about to leave."""
        self._evicted.setdefault(request_id, 0)

    def remove_pages(self, request_id: str, page_ids: Sequence[int]) -> None:
        """Returns some of a request's pages to the pool; their contents stay, for the prefix cache to hit.

        Args:
            request_id: a running request for which `stop_caching` was called.
            page_ids: ids of whole pages that it holds, and that no step reads as its own any more.
        """
        freed_ids = set(page_ids)
        before = self.req_to_blocks[request_id]
        freed = [page for page in before if page.block_id in freed_ids]
        assert len(freed) == len(page_ids), f"request {request_id} does not hold all of pages {page_ids}"
        self.req_to_blocks[request_id] = [page for page in before if page.block_id not in freed_ids]
        self._evicted[request_id] += len(freed) * self.block_size
        self.block_pool.free_blocks(reversed(freed))

    def check_pages(self, request_id: str, slots: int, most_slots: int) -> None:
        """Raises: AssertionError where a request does not hold the pages of so many slots."""
        held = self.num_pages(request_id)
        least, most = cdiv(slots, self.block_size), cdiv(most_slots, self.block_size)
        assert least <= held <= most, f"{request_id} holds {held} pages, not {least} to {most}"

    def _split(self, request_id: str, keep: int) -> tuple[list[KVCacheBlock], list[KVCacheBlock]]:
        """The request's pages: those that `keep` tokens fill, and the rest."""
        pages, num_kept = self.req_to_blocks[request_id], cdiv(keep, self.block_size)
        return pages[:num_kept], pages[num_kept:]

    @staticmethod
    def _num_shared(pages: Sequence[KVCacheBlock]) -> int:
        return sum(page.ref_cnt > 1 for page in pages)

    # -- vLLM's interface: logical counts in, physical counts to the base class ----------------------------

    @property
    def has_positionally_stable_blocks(self) -> bool:
        return False

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        evicted = self._evicted.get(request_id, 0)
        num_slots = num_tokens - evicted
        if apply_admission_cap and request_id in self._max_slots:
            num_slots = min(num_slots, self._max_slots[request_id])
        return super().get_num_blocks_to_allocate(
            request_id,
            num_slots,
            new_computed_blocks,
            total_computed_tokens - evicted,
            num_local_computed_tokens - evicted,
            num_tokens_main_model - evicted,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        evicted = self._evicted.get(request_id, 0)
        return super().allocate_new_blocks(request_id, num_tokens - evicted, num_tokens_main_model - evicted)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        # A compacted page no longer holds the tokens that its hash would promise.
        if request.request_id in self._evicted:
            return
        # In most steps no page became full.
        if num_tokens // self.block_size <= self.num_cached_block.get(request.request_id, 0):
            return
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finish, abort and preemption all come through here.
        self._evicted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def register_compacting_spec() -> None:
    """Makes vLLM build a `CompactingManager` for `CompactingSpec`, in this process."""
    # Registering ours first would make the registry believe that its built-ins are there already.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CompactingSpec, CompactingManager, uniform_type_base_spec=FullAttentionSpec)
