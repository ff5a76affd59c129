"""A request's pages over several groups of layers, on vLLM's own managers in one pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.modelless_runs import budget, run_to_end
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from rkv_vllm.bench.modelless import ModellessEngine
from rkv_vllm.host.kv_cache_spec import (
    CompactingSpec,
    has_compacting_spec,
    is_compactable,
    to_compacting_specs,
)
from rkv_vllm.scheduling.page_groups import PageGroups

PAGE = 16
LAYER: dict[str, Any] = {"block_size": PAGE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
WINDOW = SlidingWindowSpec(sliding_window=64, **LAYER)
CHUNKED = ChunkedLocalAttentionSpec(attention_chunk_size=64, **LAYER)
FULL = FullAttentionSpec(**LAYER)


def make_engine(groups: list[KVCacheSpec | None], *, pages: int, **changes: Any) -> ModellessEngine:
    settings: dict[str, Any] = {
        "page_size": PAGE,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 256,
        "max_model_len": 2048,
        "groups": groups,
    }
    return ModellessEngine(changes.pop("rkv", {}), pages=pages, **settings | changes)


def groups_of(engine: ModellessEngine) -> PageGroups:
    groups: PageGroups = engine.scheduler._groups  # type: ignore[attr-defined]
    return groups


def test_windows_hold_what_vllm_lets_them() -> None:
    """Proves that pages of windows, which are counted from lengths alone, are those that requests hold."""
    for groups in ([None, WINDOW], [WINDOW, None, CHUNKED]):
        engine = make_engine(groups, pages=2000)
        engine.add("one", list(range(3, 43)), 400, extra_args=budget(96, 32))
        found = groups_of(engine)
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        others = [manager for manager, spec in zip(managers, groups, strict=True) if spec is not None]
        request = engine.scheduler.requests["one"]
        most = 0
        while engine.scheduler.has_requests():
            if "one" not in engine.schedule().num_scheduled_tokens:
                break  # its last token is on its way
            held = sum(not page.is_null for each in others for page in each.req_to_blocks["one"])
            most = max(most, held)
            # vLLM gives pages back once no step in flight looks at them any more.
            counted = [found.others.num_pages(request.num_computed_tokens - ago) for ago in range(4)]
            assert counted[0] <= held <= max(counted) + len(others)
            engine.update()
        assert most <= found.others.most_pages(440) <= most + len(others)


def test_both_groups_find_room_together() -> None:
    """Proves that a round which has to copy shared pages in two groups wants the pages of both at once."""
    engine = make_engine([None, None], pages=100, max_num_seqs=4)
    prompt = list(range(3, 3 + 6 * PAGE))
    for name in ("one", "two"):
        engine.add(name, prompt, 200, extra_args=budget(5 * PAGE, 200))
        engine.schedule()
        engine.update()
    groups = groups_of(engine)
    assert groups.num_compacted == 2
    assert groups.num_shared_pages("one") == 2 * 5
    pool = engine.scheduler.kv_cache_manager.block_pool
    one_group = groups._compacted[0].num_to_copy("one", 5 * PAGE)
    assert groups.num_to_copy("one", 5 * PAGE) == 2 * one_group > 0
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - one_group)
    assert all(each.can_compact("one", 5 * PAGE) for each in groups._compacted)
    assert not groups.can_compact("one", 5 * PAGE)
    pool.free_blocks(taken[:one_group])
    assert groups.can_compact("one", 5 * PAGE)
    moves = groups.compact("one", 5 * PAGE, PAGE, reserved=0)
    assert pool.get_num_free_blocks() == 0
    targets = [page for move in moves for page in move.target_pages]
    assert len(set(targets)) == len(targets) == 2 * 5
    groups.release([moves])
    groups.check_pages("one", 5 * PAGE, 5 * PAGE)
    pool.free_blocks(taken[one_group:])


@pytest.mark.parametrize("groups", [[None, WINDOW], [WINDOW, None, WINDOW], [None, WINDOW, None]], ids=len)
@pytest.mark.parametrize("asked", [budget(96, 32), {"rkv_budget": "auto", "rkv_min_budget": 96}], ids=str)
def test_a_full_pool_preempts_nobody(groups: list[KVCacheSpec | None], asked: dict[str, Any]) -> None:
    """Proves that admission and budget "auto" keep room for what windows and all compacted groups grow to."""
    engine = make_engine(groups, pages=60 * len(groups))
    for index in range(24):
        engine.add(f"{index}", [3 + index] * 20, 300 + 40 * (index % 5), extra_args=asked)
    _, preemptions = run_to_end(engine)
    assert preemptions == 0


def test_what_windows_take_counts_for_who_is_too_large() -> None:
    """Proves that a request is refused where its windows leave its compacted layers too little, alone."""
    engine = make_engine([None, WINDOW], pages=13, rkv={"budget": 96, "buffer": 32, "beyond_pool": True})
    engine.add("fits", [5] * 20, 60)
    engine.add("too large", [6] * 20, 800)
    ended = {}
    while engine.scheduler.has_requests() or not ended:
        engine.schedule()
        ended |= {out.request_id: out for out in engine.update() if out.finish_reason is not None}
    refused = ended["too large"].kv_transfer_params
    assert refused is not None and "needs" in refused["rkv"]["reason"]
    kept = ended["fits"].kv_transfer_params
    assert kept is not None and "needs" not in str(kept["rkv"]["reason"])


@pytest.mark.parametrize("rkv", [{"granularity": "page"}, {"scope": "global"}])
def test_one_decision_needs_one_group(rkv: dict[str, Any]) -> None:
    """Proves that settings for which all layers decide together are refused where two groups have pages of
    their own, and pass where the other group is one of windows."""
    make_engine([None, WINDOW], pages=40, rkv=rkv)
    with pytest.raises(ValueError, match="in 2 groups, each with pages of its own"):
        make_engine([None, WINDOW, None], pages=40, rkv=rkv)


def test_other_kinds_of_groups_are_refused() -> None:
    """Proves that a scheduler names its groups where one is of an unknown kind, or none is compacted."""
    for groups in ([WINDOW], [None, FULL]):
        with pytest.raises(ValueError, match="needs full attention under its own block manager"):
            make_engine(groups, pages=40)


def test_full_attention_alone_is_put_under_our_manager() -> None:
    """Proves that windows keep vLLM's specs, and that layers of kinds that no round can shorten are named."""
    specs = to_compacting_specs({"0": FULL, "1": WINDOW, "2": CHUNKED})
    assert [type(spec) for spec in specs.values()] == [
        CompactingSpec,
        SlidingWindowSpec,
        ChunkedLocalAttentionSpec,
    ]
    assert has_compacting_spec(UniformTypeKVCacheSpecs(block_size=PAGE, kv_cache_specs={"0": specs["0"]}))
    assert not has_compacting_spec(UniformTypeKVCacheSpecs(block_size=PAGE, kv_cache_specs={"1": specs["1"]}))
    for wide in (
        FullAttentionSpec(sliding_window=64, **LAYER),
        FullAttentionSpec(attention_chunk_size=64, **LAYER),
        FullAttentionSpec(non_causal=True, **LAYER),
    ):
        assert not is_compactable(wide)
        with pytest.raises(ValueError, match="layer 1 has a FullAttentionSpec"):
            to_compacting_specs({"0": FULL, "1": wide})
    state = MambaSpec(block_size=PAGE, shapes=((1, 1),), dtypes=(torch.float32,))
    with pytest.raises(ValueError, match="layer 1 has a MambaSpec"):
        to_compacting_specs({"0": FULL, "1": state})
    with pytest.raises(ValueError, match="all of this model's have windows"):
        to_compacting_specs({"0": WINDOW})
    assert to_compacting_specs({}) == {}
