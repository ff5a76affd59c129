"""The compacting block manager on vLLM's own block pool."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from rkv_vllm.host.kv_cache_spec import CompactingSpec, to_compacting_specs
from rkv_vllm.scheduling.block_manager import (
    CompactingManager,
    PageMove,
    register_compacting_spec,
)
from rkv_vllm.settings.engine_args import rkv_engine_args

PAGE = 4
SPEC = CompactingSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)
init_none_hash(sha256)


class House:
    """A manager, its pool, and requests that come, grow, share, shrink and leave."""

    def __init__(self, num_pages: int, caching: bool = True) -> None:
        self.pool = BlockPool(num_gpu_blocks=num_pages + 1, enable_caching=caching, hash_block_size=PAGE)
        self.manager = CompactingManager(
            kv_cache_spec=SPEC,
            block_pool=self.pool,
            enable_caching=caching,
            kv_cache_group_id=0,
            scheduler_block_size=PAGE,
        )
        self.requests: dict[str, Request] = {}
        self.evicted: Counter[str] = Counter()

    def start(self, name: str, length: int, kind: int = 0) -> None:
        """A request of `length` tokens; those of one kind have one content, and share what is cached."""
        tokens = [kind * 1000 + index for index in range(length)]
        params = SamplingParams(max_tokens=1)
        request = Request(name, tokens, params, None, block_hasher=get_request_block_hasher(PAGE, sha256))
        self.requests[name] = request
        hits: list[KVCacheBlock] = []
        if self.manager.enable_caching:
            for block_hash in request.block_hashes[: (length - 1) // PAGE]:
                if (hit := self.pool.get_cached_block(block_hash, [0])) is None:
                    break
                hits += hit
        self.manager.add_local_computed_blocks(name, hits, len(hits) * PAGE, 0)
        self._take_slots(name, length)

    def grow(self, name: str, count: int) -> None:
        request = self.requests[name]
        request.append_output_token_ids([7] * count)
        self._take_slots(name, request.num_tokens)

    def _take_slots(self, name: str, length: int) -> None:
        self.manager.allocate_new_blocks(name, length, length)
        if self.manager.enable_caching:
            self.manager.cache_blocks(self.requests[name], length, replay_boundaries=())

    def missing(self, name: str, length: int) -> int:
        """Pages that vLLM would ask the pool for, so that the request has `length` logical tokens."""
        return self.manager.get_num_blocks_to_allocate(name, length, [], length, length, length)

    def physical(self, name: str) -> int:
        return self.requests[name].num_tokens - self.evicted[name]

    def compact(self, name: str, keep: int, release: bool = True, reserved: int = 0) -> PageMove:
        assert self.manager.can_compact(name, keep)
        self.evicted[name] += self.physical(name) - keep
        move = self.manager.compact(name, keep, self.evicted[name], reserved=reserved)
        if release:
            self.manager.release([move])
        return move

    def leave(self, name: str) -> None:
        self.manager.free(name)
        del self.requests[name]
        del self.evicted[name]

    def pages(self, name: str) -> list[int]:
        return [page.block_id for page in self.manager.req_to_blocks.get(name, ())]

    def free_pages(self) -> list[int]:
        return [page.block_id for page in self.pool.free_block_queue.get_all_free_blocks()]

    def check(self) -> None:
        owners = Counter(page for name in self.requests for page in self.pages(name))
        free = self.free_pages()
        assert len(set(free)) == len(free)
        assert sorted([*owners, *free, 0]) == list(range(self.pool.num_gpu_blocks))
        assert all(page.ref_cnt == owners[page.block_id] for page in self.pool.blocks[1:])
        for name in self.requests:
            assert len(self.pages(name)) == cdiv(self.physical(name), PAGE)


def test_private_pages_are_reused_in_place() -> None:
    """Proves that pages of one owner without a cache entry are written where they are, and the tail goes."""
    house = House(10, caching=False)
    house.start("a", 23)
    before = house.pages("a")
    move = house.compact("a", 9)
    assert move.source_pages == tuple(before)
    assert move.target_pages == tuple(before[:3]) == tuple(house.pages("a"))
    assert [page.block_id for page in move.freed] == before[3:]
    house.check()


def test_own_private_tail_comes_before_the_pool() -> None:
    """Proves that cached pages are replaced by the request's own leaving pages first, then by the pool's."""
    house = House(10)
    house.start("a", 8)  # two cached pages
    house.manager.num_cached_block["a"] = 99  # as if nothing more were cached
    house.grow("a", 8)
    tail, in_pool = house.pages("a")[2:], house.free_pages()
    move = house.compact("a", 8)
    assert list(move.target_pages) == tail
    assert set(house.free_pages()) == set(in_pool) | set(move.source_pages[:2])
    house.check()


def test_cached_pages_are_copied_while_there_is_room() -> None:
    """Proves that a cached page is replaced, and stays to be hit by the next request of the same content."""
    house = House(10)
    house.start("a", 16)
    before = house.pages("a")
    move = house.compact("a", 9)
    assert not set(move.target_pages) & set(before)
    house.start("b", 16)
    assert house.pages("b")[:3] == before[:3]
    house.check()


def test_cached_pages_lose_their_entry_where_there_is_no_room() -> None:
    """Proves that with an empty pool a page of one owner is reused in place and can no longer be hit."""
    house = House(4)
    house.start("a", 16)
    before = house.pages("a")
    assert house.free_pages() == []
    move = house.compact("a", 9)
    assert move.target_pages == tuple(before[:3])
    assert house.free_pages() == before[3:]
    hits = [house.pool.get_cached_block(h, [0]) for h in house.requests["a"].block_hashes]
    assert [hit is None for hit in hits] == [True, True, True, False]
    house.check()


def test_shared_pages_are_never_written() -> None:
    """Proves that a page of two owners is replaced, and that the other owner keeps it."""
    house = House(12)
    house.start("a", 16)
    house.start("b", 16)
    shared = house.pages("b")[:3]
    assert house.pages("a")[:3] == shared
    move = house.compact("a", 9)
    assert not set(move.target_pages) & set(shared)
    assert house.pages("b")[:3] == shared
    house.check()


def test_room_is_kept_for_the_shared_pages() -> None:
    """Proves that the last free page goes to a shared page, and a cached one before it is reused in place."""
    house = House(5)
    house.start("a", 16)
    first, second, third, _ = house.manager.req_to_blocks["a"]
    house.pool.touch([second])  # somebody else holds the second page
    (free,) = house.free_pages()
    move = house.compact("a", 12)
    assert move.target_pages == (first.block_id, free, third.block_id)
    assert first.block_hash is None and third.block_hash is None and second.block_hash is not None


def test_pages_that_others_need_are_left_in_the_pool() -> None:
    """Proves that a round keeps cached pages of its own only while other rounds find theirs in the pool."""
    house = House(7)
    house.start("a", 16)
    head = house.pages("a")[:3]
    move = house.compact("a", 12, reserved=3)
    assert list(move.target_pages) == head
    assert all(page.block_hash is None for page in house.manager.req_to_blocks["a"])

    house = House(7)
    house.start("a", 16)
    move = house.compact("a", 12, reserved=2)  # one page of the pool is left to it
    assert len(set(move.target_pages) - set(head)) == 1
    house.check()


def test_a_cached_page_that_leaves_replaces_a_shared_one() -> None:
    """Proves that a full pool costs a request its own cached pages before anybody is preempted."""
    house = House(4)
    house.start("a", 16)
    first, second, third, last = house.manager.req_to_blocks["a"]
    house.pool.touch([second])  # somebody else holds the second page
    assert not house.free_pages() and last.block_hash is not None
    move = house.compact("a", 12)
    assert move.target_pages == (first.block_id, last.block_id, third.block_id)
    assert second.block_hash is not None and last.block_hash is None


def test_cannot_compact_without_a_page_for_each_shared_one() -> None:
    """Proves that `can_compact` is false where shared pages outnumber the own tail and the pool."""
    house = House(6)
    house.start("a", 16)
    house.start("b", 16)  # three pages shared, one own
    assert house.free_pages() and len(house.free_pages()) == 1
    assert house.pages("a")[:3] == house.pages("b")[:3]
    assert not house.manager.can_compact("a", 12)
    assert not house.manager.can_compact("b", 12)
    house.leave("a")
    assert house.manager.can_compact("b", 12)
    house.compact("b", 12)
    house.check()


def test_pages_leave_tail_first_and_only_when_released() -> None:
    """Proves that leaving pages count as owned until released, and are handed out again tail first."""
    house = House(10, caching=False)
    house.start("a", 24)
    tail = house.pages("a")[2:]
    free = house.free_pages()
    move = house.compact("a", 8, release=False)
    assert house.free_pages() == free
    house.manager.release([move])
    assert house.free_pages()[: len(tail)] == tail[::-1]
    house.check()


def test_counts_are_physical_after_a_compaction() -> None:
    """Proves that vLLM's logical counts ask for pages of physical tokens only, until the request is freed."""
    house = House(20)
    house.start("a", 40)
    house.compact("a", 12)
    assert house.missing("a", 40) == 0
    assert house.missing("a", 41) == 1
    house.grow("a", 5)
    assert len(house.pages("a")) == cdiv(17, PAGE)
    house.leave("a")
    assert house.missing("a", 41) == cdiv(41, PAGE)


def test_compacted_pages_are_not_cached() -> None:
    """Proves that pages of a compacted request get no cache entry, even when they are full."""
    house = House(20)
    house.start("a", 40)
    house.compact("a", 12)
    house.grow("a", 20)
    assert all(page.block_hash is None for page in house.manager.req_to_blocks["a"])


def test_pages_that_left_are_returned_and_the_others_keep_their_order() -> None:
    """Proves that removed pages are free, or still the sharer's, with their cache entries, and that the rest
    is counted physically and cached no more."""
    house = House(20)
    house.start("a", 22, kind=1)
    house.start("b", 9, kind=1)  # shares two pages
    before, hashes = house.pages("a"), [page.block_hash for page in house.manager.req_to_blocks["a"]]
    house.manager.stop_caching("a")
    house.grow("a", 3)
    assert house.manager.req_to_blocks["a"][5].block_hash is None  # full only after caching stopped
    assert house.missing("a", 29) == 1
    house.manager.remove_pages("a", [before[1], before[3]])
    house.evicted["a"] = 2 * PAGE
    house.check()
    assert house.pages("a")[:4] == [before[0], before[2], before[4], before[5]]
    assert before[3] in house.free_pages() and before[1] in house.pages("b")
    assert [house.pool.blocks[before[i]].block_hash for i in (1, 3)] == [hashes[1], hashes[3]]
    assert house.missing("a", 29) == 1
    with pytest.raises(AssertionError, match="does not hold"):
        house.manager.remove_pages("a", [before[3]])


def test_admission_reckons_with_the_most_slots() -> None:
    """Proves that the cap bounds what a long request must find free at admission, while it is set."""
    house = House(4)

    def admission(length: int) -> int:
        return house.manager.get_num_blocks_to_allocate(
            "a", length, [], 0, 0, length, apply_admission_cap=True
        )

    assert admission(400) == 100
    house.manager.set_max_slots("a", 13)
    assert admission(400) == 4 and admission(5) == 2
    assert house.missing("a", 400) == 100
    house.manager.forget_max_slots("a")
    assert admission(400) == 100


def test_blocks_are_not_positionally_stable() -> None:
    """Proves that whoever asks is told not to follow this block table by token position."""
    assert not House(2).manager.has_positionally_stable_blocks


steps = st.lists(
    st.tuples(
        st.sampled_from(["start", "grow", "compact", "leave"]),
        st.sampled_from("abcd"),
        st.integers(1, 40),
        st.integers(0, 1),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(4, 24), st.booleans())
def test_no_page_is_lost(steps: list[tuple[str, str, int, int]], num_pages: int, caching: bool) -> None:
    """Proves on random lives of requests that a page is in one place, counted, and written by one."""
    house = House(num_pages, caching)
    for what, name, number, kind in steps:
        lives = name in house.requests
        if what == "start" and not lives and cdiv(number, PAGE) <= house.pool.get_num_free_blocks():
            house.start(name, number, kind)
        elif what == "grow" and lives:
            length = house.requests[name].num_tokens + number
            if house.missing(name, length) <= house.pool.get_num_free_blocks():
                house.grow(name, number)
        elif what == "compact" and lives:
            keep = min(number, house.physical(name))
            others = {page for other in house.requests if other != name for page in house.pages(other)}
            if house.manager.can_compact(name, keep):
                move = house.compact(name, keep)
                assert len(set(move.target_pages)) == len(move.target_pages) == cdiv(keep, PAGE)
                assert not set(move.target_pages) & others
                assert all(house.pool.blocks[page].block_hash is None for page in move.target_pages)
            else:
                assert set(house.pages(name)) & others
        elif what == "leave" and lives:
            house.leave(name)
        house.check()
    for name in list(house.requests):
        house.leave(name)
    assert len(house.free_pages()) == num_pages


def test_spec_finds_its_manager_beside_the_built_in_ones() -> None:
    """Proves that registering, also twice, leaves vLLM's own specs as they were."""
    register_compacting_spec()
    register_compacting_spec()
    plain = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    assert KVCacheSpecRegistry.get_manager_class(SPEC) is CompactingManager
    assert KVCacheSpecRegistry.get_manager_class(plain) is FullAttentionManager


def test_specs_are_converted_as_they_are() -> None:
    """Proves that a layer keeps every field of its spec, and that other kinds are refused by name."""
    plain = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=80, dtype=torch.bfloat16)
    converted = to_compacting_specs({"layer.0": plain})["layer.0"]
    assert type(converted) is CompactingSpec
    assert converted.page_size_bytes == plain.page_size_bytes and converted.head_size_v == plain.head_size_v
    latent = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"layer\.1 has a MLAAttentionSpec"):
        to_compacting_specs({"layer.0": plain, "layer.1": latent})


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({}, 4096),
        ({"budget": 100, "buffer": 28}, 4096),
        ({"budget": 100, "buffer": 28, "beyond_pool": True}, 128),
        ({"budget": 100, "buffer": 29, "beyond_pool": True}, 128 + PAGE),
        ({"budget": 5000, "beyond_pool": True}, 4096),
    ],
)
def test_what_the_pool_must_hold_at_start(asked: dict[str, Any], tokens: int) -> None:
    """Proves that vLLM's check at start asks for max_model_len, and for the budget alone where that is
    opted into; and that once the pool has a size, its tokens are reckoned by max_model_len in any case."""
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=4096),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(num_gpu_blocks=None),
        additional_config=rkv_engine_args(**asked)["additional_config"],
    )
    assert SPEC.max_memory_usage_bytes(vllm_config) == tokens // PAGE * SPEC.page_size_bytes
    vllm_config.cache_config.num_gpu_blocks = 40
    assert SPEC.max_memory_usage_bytes(vllm_config) == 4096 // PAGE * SPEC.page_size_bytes
