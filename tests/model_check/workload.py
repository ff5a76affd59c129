"""Random workloads: shared prefixes, mixed budgets, aborts, small pools."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from model_check_engine import Arrival, Setup
from request_model import VOCABULARY, Window
from vllm.utils.math_utils import cdiv

from rkv_vllm.settings.config import WINDOW, RkvConfig
from rkv_vllm.settings.policy_table import POLICY_NAMES


def random_arrivals(chance: random.Random, count: int, by_step: bool = False) -> list[Arrival]:
    """Some requests; `by_step` lets clients hang up at a step, which depends on the engine's depth.

    In half of the workloads every request is compacted, so that the smallest pool is small for all of them.
    """
    all_compacted = chance.random() < 0.5
    stems = [_tokens(chance, chance.randrange(20, 140)) for _ in range(2)]
    arrivals: list[Arrival] = []
    for index in range(count):
        if arrivals and chance.random() < 0.3:  # another sample of the same prompt
            arrivals.append(replace(arrivals[-1], request_id=f"request-{index}"))
            continue
        stem = chance.choice(stems)
        own = _tokens(chance, chance.choice((1, 5, 16, 40)))
        prompt = chance.choice((stem, stem[: chance.randrange(8, len(stem))] + own, own, stem + own))
        at_step = chance.randrange(0, 120) if chance.random() < 0.7 else 0
        arrivals.append(
            Arrival(
                request_id=f"request-{index}",
                prompt=prompt,
                max_tokens=chance.choice((1, 3, 40, 90, 160, 240)),
                extra_args=_budget(chance, prompt) if all_compacted else _extra_args(chance, prompt),
                at_step=at_step,
                abort_after_tokens=chance.randrange(1, 120) if chance.random() < 0.15 else None,
                abort_at_step=at_step + chance.randrange(1, 150)
                if by_step and chance.random() < 0.15
                else None,
                priority=chance.randrange(3),
            )
        )
    return arrivals


def random_setup(chance: random.Random, arrivals: list[Arrival]) -> Setup:
    config = RkvConfig(
        budget=chance.choice((None, 24, 32, 50, 64)),
        buffer=chance.choice((8, 16, 24, 50)),
        policy=chance.choice(POLICY_NAMES),
    )
    setup = Setup(
        num_pages=0,
        page_size=chance.choice((8, 8, 16, 16, 16, 32, 128)),
        max_num_seqs=chance.choice((2, 4, 8, 12)),
        query_rows=chance.choice((None, 1, 2, 3, 4)),
        max_num_batched_tokens=chance.choice((16, 32, 64, 256)),
        prefix_caching=chance.random() < 0.75,
        priorities=chance.random() < 0.25,
        v2_runner=chance.random() < 0.5,
        watermark=chance.choice((0.0, 0.0, 0.0, 0.1)),
        long_prefill_token_threshold=chance.choice((0, 0, 0, 24)),
        restless=chance.random() < 0.3,
        config=config,
        seed=chance.randrange(1 << 30),
    )
    spare = chance.choice((0, 0, 1, 2, 4, 8))
    keeps_room = chance.random() < 0.5
    return replace(setup, num_pages=smallest_pool(setup, arrivals) + spare, keeps_room=keeps_room)


def with_auto(chance: random.Random, arrivals: list[Arrival]) -> list[Arrival]:
    """The same requests, but of those with a budget most go down to it only where memory is short."""
    return [_auto(chance, each) if chance.random() < 0.75 else each for each in arrivals]


def _auto(chance: random.Random, arrival: Arrival) -> Arrival:
    asked = dict(arrival.extra_args or {})
    budget = asked.get("rkv_budget")
    if not isinstance(budget, int) or not budget:
        return arrival
    asked |= {"rkv_budget": "auto", "rkv_min_budget": budget}
    kind = chance.random()
    if kind < 0.15:
        asked["rkv_max_budget"] = budget + chance.choice((1, 30, 100))
    elif kind < 0.25:
        asked["rkv_switch_at"] = chance.randrange(1, 200)
    return replace(arrival, extra_args=asked)


def by_page(setup: Setup, arrivals: list[Arrival]) -> Setup:
    """The same engine, but whole pages leave, small enough to do so often; the pool's spare ones stay."""
    spare = setup.num_pages - smallest_pool(setup, arrivals)
    config = setup.config.model_copy(update={"granularity": "page"})
    paged = replace(setup, config=config, page_size=min(setup.page_size, 32))
    return replace(paged, num_pages=smallest_pool(paged, arrivals) + spare)


def with_groups(chance: random.Random, setup: Setup, arrivals: list[Arrival]) -> Setup:
    """The same engine, but for a model with windows, and perhaps several groups of full attention."""
    spare = setup.num_pages - smallest_pool(setup, arrivals)
    page_size = min(setup.page_size, 16)
    window = Window(chance.choice((3, page_size, 20, 40)))
    if chance.random() < 0.3:
        window = Window(page_size * chance.choice((1, 2, 3)), chunked=True)
    groups = chance.choice(((window, None), (None, window), (window, None, window), (None, window, None)))
    grouped = replace(setup, page_size=page_size, groups=groups, dense_retention=chance.random() < 0.5)
    return replace(grouped, num_pages=smallest_pool(grouped, arrivals) + spare)


def with_drafts(chance: random.Random, setup: Setup) -> Setup:
    """The same engine, but it speculates: from all drafts wrong to nearly all of them right."""
    return replace(setup, drafts=chance.choice((1, 4, 4, 15)), luck=chance.choice((0.0, 0.5, 0.8, 0.97)))


def smallest_pool(setup: Setup, arrivals: list[Arrival]) -> int:
    """Pages with which each request can finish when it is alone, and the null page."""
    return max(_smallest_of(setup, arrival) for arrival in arrivals) + 1


def _smallest_of(setup: Setup, arrival: Arrival) -> int:
    compacted = cdiv(arrival.peak_slots(setup), setup.page_size) * setup.num_compacted
    return compacted + setup.pages_of_windows(len(arrival.prompt) + arrival.max_tokens)


def _tokens(chance: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chance.randrange(1, VOCABULARY) for _ in range(count))


def _extra_args(chance: random.Random, prompt: tuple[int, ...]) -> dict[str, Any] | None:
    kind = chance.random()
    if kind < 0.35:
        return None
    return {"rkv_budget": 0} if kind < 0.5 else _budget(chance, prompt)


def _budget(chance: random.Random, prompt: tuple[int, ...]) -> dict[str, Any]:
    """Settings of a request; every other protects its first tokens, as many as its budget has room for."""
    budget = chance.choice((9, 16, 24, 32, 48, 72))
    room = budget - WINDOW - 1
    asked: dict[str, Any] = {
        "rkv_budget": budget,
        "rkv_buffer": chance.choice((8, 9, 16, 64, 96)),
        "rkv_policy": chance.choice(POLICY_NAMES),
        "another": "argument",
    }
    if len(prompt) % 2:
        asked["rkv_protect"] = "prompt" if len(prompt) <= room else min(len(prompt) // 2, room)
    elif len(prompt) % 8 == 0:
        asked["rkv_budget"] = "20%"
    return asked
