"""The scheduler's protocol against a model of each request: no slot wrong, no page lost, same answers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from model_check_engine import Arrival, Engine, Outcome, Setup, make_scheduler
from request_model import VOCABULARY
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from workload import (
    by_page,
    random_arrivals,
    random_setup,
    smallest_pool,
    with_auto,
    with_drafts,
    with_groups,
)

from rkv_vllm.decisions.messages import PageReport, plan_of
from rkv_vllm.settings.config import Granularity, RkvConfig

RUNS_PER_TEST = 8
#: More, for it is rare that a request ends, or is preempted, before the report of its pages.
PAGE_RUNS_PER_TEST = 16


@pytest.mark.parametrize(
    ("first_seed", "granularity"),
    [
        *((seed, "token") for seed in range(0, 96, RUNS_PER_TEST)),
        *((seed, "page") for seed in range(0, 48, PAGE_RUNS_PER_TEST)),
        *((seed, "auto") for seed in range(0, 96, PAGE_RUNS_PER_TEST)),
        *((seed, "drafts") for seed in range(0, 96, PAGE_RUNS_PER_TEST)),
        *((seed, "groups") for seed in range(0, 96, PAGE_RUNS_PER_TEST)),
    ],
)
def test_every_slot_holds_what_it_should(first_seed: int, granularity: str, totals: Counter[str]) -> None:
    """Proves on random small engines of depth 1 to 3 that no step reads wrong KV, queries or cached pages.

    Where whole pages leave, the scheduler learns which one to three steps late. With budget "auto" it decides
    when a request is first compacted. With drafts, it learns one to three steps late which were rejected.
    With several groups of layers, windows read by positions in the text, and all groups share one pool.
    """
    seen: Counter[str] = Counter()
    runs = RUNS_PER_TEST if granularity == "token" else PAGE_RUNS_PER_TEST
    for seed in range(first_seed, first_seed + runs):
        chance = random.Random(seed)
        arrivals = random_arrivals(chance, count=chance.randrange(4, 14), by_step=True)
        if granularity == "auto" or (granularity in ("drafts", "groups") and seed % 4 == 0):
            arrivals = with_auto(chance, arrivals)
        setup = random_setup(chance, arrivals)
        if granularity == "page" or (granularity == "drafts" and seed % 4 == 1):
            setup = by_page(setup, arrivals)
        if granularity == "drafts":
            setup = with_drafts(chance, setup)
        setup = replace(
            setup,
            depth=1 + seed % 3,
            reset_at_steps=frozenset(chance.sample(range(200), chance.choice((0, 0, 2)))),
        )
        if granularity == "groups":
            setup = with_groups(chance, setup, arrivals)
        seen += Engine(setup, arrivals).run().counts
    totals.update(seen, runs=runs)
    own = {
        "token": "copied pages",
        "page": "late reports",
        "auto": "switches",
        "drafts": "rounds that wait for drafts",
        "groups": "cached pages checked",
    }[granularity]
    assert all(seen[what] for what in ("compactions", own, "preemptions", "replayed compactions"))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_the_pool_cannot_hold_is_refused_alone(depth: int) -> None:
    """Proves that requests larger than the pool, before or among others, end at once and change nothing."""
    chance = random.Random(depth)
    arrivals = random_arrivals(chance, count=8, by_step=True)
    setup = replace(random_setup(chance, arrivals), depth=depth)
    setup = replace(setup, num_pages=smallest_pool(setup, arrivals))
    pool_tokens = (setup.num_pages - 1) * setup.page_size
    too_large = [
        Arrival("long prompt", (1,) * (pool_tokens + 1), 1),
        Arrival("full cache", (1,) * 5, pool_tokens - 4, {"rkv_budget": 0}, at_step=2),
        Arrival("large budget", (1,) * 5, pool_tokens, {"rkv_budget": pool_tokens}, at_step=20),
    ]
    expected = Engine(setup, arrivals).run()
    engine = Engine(setup, too_large + arrivals)
    found = engine.run()
    assert engine.refused == {arrival.request_id for arrival in too_large}
    assert all(
        found.tokens[arrival.request_id] == expected.tokens[arrival.request_id] for arrival in arrivals
    )


def alone(setup: Setup, arrival: Arrival) -> Outcome:
    """The request in an engine of its own, with room for everything."""
    setup = replace(setup, num_pages=100, depth=1, prefix_caching=False, priorities=False)
    return Engine(setup, [replace(arrival, at_step=0)]).run()


@pytest.mark.parametrize(
    ("seed", "granularity"), [*((seed, "token") for seed in range(6)), (1, "page"), (5, "page")]
)
def test_answers_are_those_of_the_request_alone(seed: int, granularity: str, totals: Counter[str]) -> None:
    """Proves that tokens and compaction points depend on no neighbour, pool, preemption, reset or depth."""
    chance = random.Random(1000 + seed)
    arrivals = random_arrivals(chance, count=8)
    setup = random_setup(chance, arrivals)
    if granularity == "page":
        setup = by_page(setup, arrivals)
    expected = [alone(setup, arrival) for arrival in arrivals]
    tokens = {request_id: said for outcome in expected for request_id, said in outcome.tokens.items()}
    points = {request_id: at for outcome in expected for request_id, at in outcome.points.items()}
    roomy, small = 400, smallest_pool(setup, arrivals) + 1
    resets = frozenset(chance.sample(range(10, 150), 3))
    variants = [
        *(replace(setup, num_pages=roomy, depth=depth, prefix_caching=True) for depth in (1, 2, 3)),
        *(replace(setup, num_pages=small, depth=depth, prefix_caching=False) for depth in (1, 2, 3)),
        *(replace(setup, num_pages=small, depth=depth, prefix_caching=True) for depth in (1, 2, 3)),
        *(replace(setup, num_pages=small, depth=depth, reset_at_steps=resets) for depth in (1, 3)),
        replace(setup, num_pages=roomy, max_num_batched_tokens=16, max_num_seqs=3),
    ]
    for variant in variants:
        outcome = Engine(variant, arrivals).run()
        totals.update(outcome.counts, runs=1)
        assert outcome.tokens == tokens, variant
        assert outcome.points == points, variant


@pytest.mark.parametrize(("seed", "granularity"), [(0, "token"), (1, "token"), (2, "token"), (3, "page")])
def test_drafts_change_no_answer(seed: int, granularity: str, totals: Counter[str]) -> None:
    """Proves that tokens and compaction points are those without drafts, at any depth and in any pool."""
    chance = random.Random(2000 + seed)
    # A client that leaves after so many tokens may get some more with drafts.
    arrivals = [replace(each, abort_after_tokens=None) for each in random_arrivals(chance, count=8)]
    setup = random_setup(chance, arrivals)
    if granularity == "page":
        setup = by_page(setup, arrivals)
    expected = Engine(replace(setup, num_pages=400), arrivals).run()
    for depth in (1, 2, 3):
        for drafts, luck in ((4, 0.9), (15, 0.6), (15, 0.0)):
            for num_pages in (400, smallest_pool(setup, arrivals) + 1):
                speculating = replace(setup, depth=depth, drafts=drafts, luck=luck, num_pages=num_pages)
                outcome = Engine(speculating, arrivals).run()
                totals.update(outcome.counts, runs=1)
                assert outcome.tokens == expected.tokens, speculating
                assert outcome.points == expected.points, speculating
                if luck == 0.9 and num_pages == 400 and depth == setup.depth:
                    assert outcome.counts["schedules"] < expected.counts["schedules"]


@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_newcomer_is_padded_with_drafts_before_its_window_alone(depth: int, length: int) -> None:
    """Proves that one with a single token to compute, which vLLM pads with drafts, starts though a round is
    due within them, or no query row is free: by a shorter hit, or in spite of both."""
    # Due at 40 and without a window, so that 32 tokens may be hit; or at 17, with a window from 9 on.
    budget, buffer, policy = (24, 16, "recency") if length > 1 else (9, 8, "rkv")
    short = {"rkv_budget": budget, "rkv_buffer": buffer, "rkv_policy": policy}
    first = Arrival("first", prompt(length), 60, short, stops_early=False)
    again = [replace(first, request_id=f"again-{n}", at_step=20 + 5 * n) for n in range(3)]
    setup = Setup(num_pages=40, depth=depth, drafts=15, luck=0.5, query_rows=1)
    outcome = Engine(setup, [first, *again]).run()
    assert all(outcome.tokens[each.request_id] == outcome.tokens["first"] for each in again)
    assert all(points == outcome.points["first"] for points in outcome.points.values())


def test_compaction_points_follow_from_the_definition() -> None:
    """Proves that a request is compacted at its prompt's end or budget + buffer, then each buffer tokens."""
    for length, first in ((10, 48), (48, 48), (90, 90)):
        arrival = Arrival(
            "one", tuple(range(1, length + 1)), 100, {"rkv_budget": 32, "rkv_buffer": 16, "rkv_policy": "rkv"}
        )
        outcome = Engine(Setup(num_pages=40, max_num_batched_tokens=32), [arrival]).run()
        last = length + len(outcome.tokens["one"]) - 2
        assert outcome.points["one"] == list(range(first, last + 1, 16))


def prompt(length: int, start: int = 1) -> tuple[int, ...]:
    return tuple(1 + (start * 31 + 7 * index) % (VOCABULARY - 1) for index in range(length))


def test_page_evictions_follow_from_the_definition() -> None:
    """Proves that whole pages leave at the prompt's end or budget + buffer, then page by page."""
    budget = {"rkv_budget": 40, "rkv_buffer": 20, "rkv_policy": "rkv"}  # 3 pages of 16 stay, due at 60 slots
    for length, first, second in ((10, 60, 76), (60, 60, 76), (90, 90, 108)):
        arrival = Arrival("one", tuple(range(1, length + 1)), 100, budget)
        setup = Setup(
            num_pages=40, max_num_batched_tokens=32, config=RkvConfig(granularity="page", policy="keydiff")
        )
        outcome = Engine(setup, [arrival]).run()
        last = length + len(outcome.tokens["one"]) - 2
        assert outcome.points["one"] == [first, *range(second, last + 1, 16)]


@pytest.mark.parametrize("granularity", ["token", "page"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_who_will_not_decode_again_is_not_compacted(
    depth: int, max_tokens: int, granularity: Granularity
) -> None:
    """Proves that a long prompt has as many rounds as its answer makes use of, at any depth."""
    budget = {"rkv_budget": 24, "rkv_buffer": 8, "rkv_policy": "rkv"}
    arrivals = [Arrival(f"{i}", prompt(100, i), max_tokens, budget, stops_early=False) for i in range(4)]
    config = RkvConfig(granularity=granularity)
    outcome = Engine(Setup(num_pages=60, depth=depth, config=config), arrivals).run()
    assert outcome.counts["compactions"] == (4 if max_tokens > 1 else 0)


@pytest.mark.parametrize(
    ("page_size", "length", "budget", "buffer"), [(16, 48, 24, 8), (32, 64, 33, 24), (128, 512, 130, 128)]
)
def test_no_eviction_looks_at_a_neighbours_queries(
    page_size: int, length: int, budget: int, buffer: int
) -> None:
    """Proves that after a round which leaves the last page full, the next waits for queries of its own."""
    extra_args = {"rkv_budget": budget, "rkv_buffer": buffer, "rkv_policy": "rkv"}
    arrivals = [Arrival(f"{i}", prompt(length, i), 160, extra_args, stops_early=False) for i in range(3)]
    setup = Setup(
        num_pages=200,
        page_size=page_size,
        max_num_batched_tokens=2048,
        prefix_caching=False,
        config=RkvConfig(granularity="page"),
    )
    together = Engine(setup, arrivals).run()
    for arrival in arrivals:
        assert together.tokens[arrival.request_id] == alone(setup, arrival).tokens[arrival.request_id]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_request_outgrows_the_pool_by_page(depth: int) -> None:
    """Proves that pages which are leaving do not stop a request that has the smallest pool for itself."""
    arrivals = [Arrival(f"{i}", prompt(20, i), 240, {"rkv_budget": 24, "rkv_buffer": 8}) for i in range(4)]
    config = RkvConfig(policy="keydiff", granularity="page")
    setup = Setup(num_pages=5, depth=depth, max_num_seqs=1, config=config)
    outcome = Engine(setup, arrivals).run()
    assert max(map(len, outcome.tokens.values())) > 5 * setup.page_size
    assert outcome.counts["preemptions"] == 0


def test_a_report_of_an_earlier_life_is_ignored() -> None:
    """Proves that a report which is not that of the request's newest eviction frees no page."""
    arrival = Arrival("one", prompt(60), 20, {"rkv_budget": 24, "rkv_buffer": 8, "rkv_policy": "recency"})
    engine = Engine(Setup(num_pages=20, config=RkvConfig(granularity="page")), [arrival])
    engine._add(arrival)
    engine._one_step()
    output = engine.schedule()
    (eviction,) = plan_of(output).rounds
    held = list(engine._manager.req_to_blocks["one"])
    oldest = tuple(page.block_id for page in held[:2])
    engine.scheduler._planner.apply_page_report(PageReport("one", eviction.eviction_id - 1, oldest))
    engine.scheduler._planner.apply_page_report(PageReport("another", eviction.eviction_id, oldest))
    assert engine._manager.req_to_blocks["one"] == held
    engine._update(output, engine.runner.execute(output))
    assert len(engine._manager.req_to_blocks["one"]) == len(held) - 2


def test_a_request_outgrows_the_pool() -> None:
    """Proves that a compacted request runs to its end with fewer slots than tokens, and leaves none."""
    arrivals = [Arrival(f"{i}", prompt(20, i), 240, {"rkv_budget": 24, "rkv_buffer": 8}) for i in range(4)]
    setup = Setup(num_pages=3, config=RkvConfig(policy="keydiff"))
    outcome = Engine(setup, arrivals).run()
    assert max(map(len, outcome.tokens.values())) > 3 * setup.page_size
    assert outcome.counts["preemptions"] == 0


@pytest.mark.parametrize("granularity", ["token", "page"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_full_pool_of_budgets_preempts_nobody(depth: int, together: bool, granularity: Granularity) -> None:
    """Proves that admission keeps room for what running requests grow to, in step and out of step."""
    budgets = [{"rkv_budget": budget, "rkv_buffer": 24, "rkv_policy": "recency"} for budget in (40, 56, 120)]
    arrivals = [
        Arrival(
            f"{i}",
            prompt(20, i),
            max_tokens=90 + 50 * (i % 4),
            extra_args=budgets[i % 3],
            at_step=0 if together else 2 * i,
            stops_early=False,
        )
        for i in range(30)
    ]
    config = RkvConfig(granularity=granularity)
    setup = Setup(num_pages=60, depth=depth, max_num_seqs=30, prefix_caching=False, config=config)
    careful, eager = (Engine(replace(setup, keeps_room=keeps), arrivals).run() for keeps in (True, False))
    assert careful.counts["preemptions"] == 0 and eager.counts["preemptions"] > 10
    assert careful.counts["schedules"] < 1.2 * eager.counts["schedules"]
    assert careful.tokens == eager.tokens


def test_sharers_of_a_full_pool_are_compacted_when_they_are_due() -> None:
    """Proves that a compaction without a page to copy into takes one from a neighbour and does not wait."""
    budget = {"rkv_budget": 56, "rkv_buffer": 8, "rkv_policy": "recency"}
    twins = [Arrival(name, prompt(64), 40, budget) for name in ("first", "second")]
    roomy, full = (Engine(Setup(num_pages=pages, keeps_room=False), twins).run() for pages in (100, 6))
    assert full.counts["preemptions"] > 0 and roomy.counts["preemptions"] == 0
    assert full.points == roomy.points and full.tokens == roomy.tokens


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_too_few_query_rows_change_no_answer(depth: int) -> None:
    """Proves that a request without a query row waits before its window, and is compacted where it is due."""
    budget = {"rkv_budget": 24, "rkv_buffer": 8, "rkv_policy": "rkv"}
    arrivals = [Arrival(f"{i}", prompt(20, i), 90, budget) for i in range(6)]
    setup = Setup(num_pages=60, depth=depth)
    enough = Engine(setup, arrivals).run()
    too_few = Engine(replace(setup, query_rows=2), arrivals).run()
    assert too_few.counts["schedules"] > enough.counts["schedules"]
    assert too_few.tokens == enough.tokens and too_few.points == enough.points


@pytest.mark.parametrize("priorities", [True, False])
def test_waiting_requests_do_not_keep_query_rows(priorities: bool) -> None:
    """Proves that requests which find no pages leave the query rows to the running ones."""
    small = {"rkv_budget": 16, "rkv_buffer": 8}
    arrivals = [Arrival("running", prompt(96), 60, {"rkv_budget": 64, "rkv_buffer": 48})] + [
        Arrival(f"waiting-{i}", prompt(40, 2 + i), 20, small, at_step=1 + i, priority=3 - i) for i in range(2)
    ]
    setup = Setup(num_pages=8, max_num_seqs=2, priorities=priorities, prefix_caching=False)
    Engine(setup, arrivals).run(most_steps=2_000)


def test_a_wrong_setting_falls_back_to_the_default() -> None:
    """Proves that a bad per-request value that comes past the front end does not stop the engine."""
    scheduler = make_scheduler(Setup(num_pages=10, config=RkvConfig(budget=40)))
    for request_id, extra_args in (("bad", {"rkv_budget": "many"}), ("good", {"rkv_budget": 20})):
        params = SamplingParams(max_tokens=4, extra_args=extra_args)
        scheduler.add_request(Request(request_id, [1, 2, 3], params, None))
    budgets = {request_id: tracked.settings.budget for request_id, tracked in scheduler._tracked.items()}
    assert budgets == {"bad": 40, "good": 20}


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_leaves_says_nothing_of_how_long_answers_are(leaves: bool) -> None:
    """Proves that admission counts on answers to end early after stop tokens, and not after disconnects."""
    arrivals = [
        Arrival(
            f"{index}",
            prompt(20, index),
            400,
            {"rkv_budget": 64, "rkv_buffer": 16, "rkv_policy": "recency"},
            stops_early=not leaves,
            abort_after_tokens=12 if leaves else None,
        )
        for index in range(24)
    ]
    engine = Engine(Setup(num_pages=60), arrivals)
    outcome = engine.run()
    assert all(len(said) < 400 for said in outcome.tokens.values())
    assert (engine.scheduler._admission.early_stop_rate.per_token(running_tokens=0) == 0.0) is leaves


@pytest.mark.parametrize("seed", [0, 5, 8, 9, 10, 12])  # in which pressure decides for several
def test_an_answer_of_auto_follows_from_its_switch(seed: int, totals: Counter[str]) -> None:
    """Proves that the length at which a request has switched, which its result tells, is all that pressure
    decides: alone, and told to switch there, it says the same and is compacted at the same lengths."""
    chance = random.Random(2000 + seed)
    arrivals = with_auto(chance, random_arrivals(chance, count=12))
    setup = random_setup(chance, arrivals)
    setup = replace(setup, num_pages=smallest_pool(setup, arrivals) + 2)
    for depth in (1, 2, 3):
        engine = Engine(replace(setup, depth=depth), arrivals)
        outcome = engine.run()
        totals.update(outcome.counts, runs=1)
        assert outcome.counts["switches"]
        for arrival in arrivals:
            name, result = arrival.request_id, engine.results.get(arrival.request_id)
            if result is None or result["budget"] != "auto":
                continue
            assert arrival.extra_args is not None
            told = dict(arrival.extra_args)
            if result["compactions"]:
                told["rkv_switch_at"] = result["switches"]
            else:
                told = {"rkv_budget": 0}
            again = alone(setup, replace(arrival, extra_args=told))
            assert again.tokens[name] == outcome.tokens[name]
            assert again.points[name] == outcome.points[name]


@pytest.mark.parametrize("policy", ["invariant", "rkv", "recency"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_full_pool_of_auto_preempts_nobody(depth: int, policy: str) -> None:
    """Proves that requests are made to switch in time, and that those which need not keep everything."""
    auto = {"rkv_budget": "auto", "rkv_min_budget": 40, "rkv_buffer": 24, "rkv_policy": policy}
    arrivals = [
        Arrival(f"{i}", prompt(20, i), 90 + 50 * (i % 4), auto, at_step=3 * i, stops_early=False)
        for i in range(30)
    ]
    setup = Setup(num_pages=90, depth=depth, max_num_seqs=30, prefix_caching=False)
    outcome = Engine(setup, arrivals).run()
    assert outcome.counts["preemptions"] == 0
    assert outcome.counts["switches"] >= 5 and outcome.counts["full caches kept"] >= 5


@pytest.mark.parametrize("policy", ["invariant", "rkv", "recency"])
@pytest.mark.parametrize("hit", [False, True])
def test_a_prompt_that_fills_the_pool_switches_behind_it(hit: bool, policy: str) -> None:
    """Proves that a request which finds no room for the notice of a switch is ordered to as it arrives, with
    a cached prefix too, and is not preempted for ever."""
    auto = {"rkv_budget": "auto", "rkv_min_budget": 24, "rkv_buffer": 8, "rkv_policy": policy}
    arrivals = [Arrival(f"{i}", prompt(95), 60, auto, at_step=300 * i) for i in range(1 + hit)]
    outcome = Engine(Setup(num_pages=13, page_size=8), arrivals).run(most_steps=1000)
    assert outcome.counts["preemptions"] == 0
    assert all(points[0] == 95 for points in outcome.points.values())


def test_auto_gives_way_by_priority() -> None:
    """Proves that the less urgent requests are cut first, and that an urgent newcomer is let in."""
    auto = {"rkv_budget": "auto", "rkv_min_budget": 24, "rkv_buffer": 8, "rkv_policy": "rkv"}
    patient, urgent = (
        [
            Arrival(name, prompt(20, index), 150, auto, priority=priority, at_step=step, stops_early=False)
            for index, (name, step) in enumerate(steps.items(), start=priority)
        ]
        for priority, steps in ((9, {"a": 0, "b": 0, "c": 0}), (1, {"d": 0, "e": 60, "f": 120}))
    )
    outcome = Engine(Setup(num_pages=44, priorities=True, prefix_caching=False), patient + urgent).run()
    assert outcome.counts["preemptions"] == 0
    assert all(outcome.points[each.request_id] for each in patient)
    assert not any(outcome.points[each.request_id] for each in urgent)
