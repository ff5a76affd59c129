"""What routers are told of the prefix cache by vLLM's KV events, where requests are compacted."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

from model_check_engine import Engine
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
from workload import by_page, random_arrivals, random_setup

RUNS = 16


def in_cache(events: list[Any]) -> Counter[Any]:
    """How many pages of each hash a subscriber believes to be in the cache."""
    pages: Counter[Any] = Counter()
    for event in events:
        if isinstance(event, AllBlocksCleared):
            pages.clear()
        elif isinstance(event, BlockStored):
            pages.update(event.block_hashes)
        else:
            assert isinstance(event, BlockRemoved)
            pages.subtract(event.block_hashes)
            assert min(pages[each] for each in event.block_hashes) >= 0, "removed before it was stored"
    return +pages


def test_what_was_stored_and_not_removed_is_in_the_cache() -> None:
    """Proves on random engines, by token and by page, that a subscriber knows the prefix cache exactly."""
    totals: Counter[str] = Counter()
    for seed in range(RUNS):
        chance = random.Random(seed)
        arrivals = random_arrivals(chance, count=8, by_step=True)
        setup = replace(random_setup(chance, arrivals), depth=1 + seed % 3, prefix_caching=True)
        setup = by_page(setup, arrivals) if seed % 2 else setup
        engine = Engine(replace(setup, reset_at_steps=frozenset(chance.sample(range(200), 1))), arrivals)
        pool = engine.scheduler.kv_cache_manager.block_pool
        pool.enable_kv_cache_events = True
        batches: list[KVEventBatch] = []
        engine.scheduler.kv_event_publisher.publish = batches.append
        totals += engine.run().counts
        events = [event for batch in batches for event in batch.events] + pool.take_events()
        totals["removed"] += sum(isinstance(event, BlockRemoved) for event in events)
        cached: Counter[Any] = Counter(
            maybe_convert_block_hash(get_block_hash(page.block_hash))
            for page in pool.blocks
            if page.block_hash is not None
        )
        assert in_cache(events) == cached
    assert totals["compactions"] and totals["preemptions"] and totals["resets"] and totals["removed"]
