"""Which pages leave: chosen by score, dropped from a block table, and scored from that table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from support.paged_cache import DEVICE, PagedCache
from support.plain_cache import all_layers

from rkv_vllm.decisions.messages import PageCompaction, PageReport
from rkv_vllm.decisions.query_rows import NO_QUERY_ROW
from rkv_vllm.execution.gpu.compactor import GpuPageCompactor
from rkv_vllm.kernels import naive
from rkv_vllm.kernels.page_eviction import choose_pages, drop_pages
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import ScoreInputs, make_policies
from rkv_vllm.settings.config import WINDOW, PolicyName, RkvConfig
from rkv_vllm.settings.policy_table import NUM_QUERIES

PAGE = 16
#: Tokens of every other request that never leave: on two pages, one of them in part.
PROTECT = 17


@pytest.mark.parametrize(
    ("scores", "drop", "leave"),
    [
        ([3.0, 1.0, 2.0, 0.0], 2, [1, 3]),
        ([3.0, 1.0, 2.0, 0.0], 0, []),
        ([3.0, 1.0], 2, [0, 1]),
        ([1.0, 1.0, 1.0], 1, [2]),  # of equals the older stay
        ([math.inf, -1.0, math.nan, -2.0], 1, [2]),
    ],
)
def test_pages_of_lowest_score_leave(scores: list[float], drop: int, leave: list[int]) -> None:
    """Proves which pages leave, with ties and NaN, and that both answers are ascending and miss none."""
    stay, left = choose_pages(torch.tensor(scores, device=DEVICE), drop)
    assert left.tolist() == leave
    assert stay.tolist() == [page for page in range(len(scores)) if page not in leave]


def test_protected_pages_stay_whatever_their_scores() -> None:
    """Proves that the first pages stay, NaN or not, and that all others may leave."""
    scores = torch.tensor([math.nan, -5.0, 1.0, math.inf, 0.0], device=DEVICE)
    for drop, leave in ((1, [4]), (2, [2, 4]), (3, [2, 3, 4])):
        stay, left = choose_pages(scores, drop, 2)
        assert left.tolist() == leave
        assert stay.tolist() == [page for page in range(5) if page not in leave]


def test_more_pages_than_there_are_cannot_leave() -> None:
    """Proves that an impossible count is refused."""
    with pytest.raises(ValueError, match="cannot drop 3 of 2 pages"):
        choose_pages(torch.zeros(2, device=DEVICE), 3)
    with pytest.raises(ValueError, match="cannot drop 2 of 1 pages"):
        choose_pages(torch.zeros(2, device=DEVICE), 2, 1)


def test_a_row_closes_its_gaps() -> None:
    """Proves that the other pages move up in order, and that the ids of those that left come back."""
    row = torch.tensor([40, 41, 42, 43, 44, 99], dtype=torch.int32, device=DEVICE)
    left = drop_pages(row[:5], torch.tensor([0, 3], device=DEVICE), torch.tensor([1, 2, 4], device=DEVICE))
    assert left.tolist() == [40, 43]
    assert row[:3].tolist() == [41, 42, 44]
    assert row[5] == 99


class Tables:
    """The rows of a block table on the device."""

    def __init__(self, rows: dict[str, torch.Tensor]) -> None:
        self._rows = rows
        self.num_pages: dict[str, int] = {}

    def page_row(self, request_id: str) -> torch.Tensor:
        return self._rows[request_id]

    def replace_pages(self, request_id: str, pages: Sequence[int]) -> None:
        raise AssertionError("which pages stay is known on the device alone")

    def set_num_pages(self, request_id: str, pages: int) -> None:
        self.num_pages[request_id] = pages


def test_the_gpu_compactor_drops_the_pages_of_the_definition() -> None:
    """Proves for every policy, in one batch, that the lowest means over tokens, heads and layers leave."""
    config, scale = RkvConfig(granularity="page", mix_lambda=0.3), 32**-0.5
    rounds: list[tuple[PolicyName, int, int]] = [
        ("rkv", 121, 3),  # policy, length, pages that stay; the window lies on two pages
        ("keydiff", 80, 4),
        ("snapkv", 64, 3),
        ("recency", 100, 4),
        ("random", 97, 4),
        ("invariant", 99, 4),
        ("rkv", 104, 5),
    ]
    cache = PagedCache(
        [length for _, length, _ in rounds], layers=2, heads=2, group=2, head_size=32, shift=0.0, seed=3
    )
    layers, queries, before, unused = cache.layers, cache.queries, cache.source, cache.free[0]
    policies = make_policies(config)
    pairs = RotaryPairs(rotated=32)
    compactor = GpuPageCompactor(
        layers,
        queries,
        lambda: cache.factors,
        config,
        policies,
        group=all_layers(2),
        pairs=pairs,
        longest=1024,
        ranks_per_kv_head=1,
    )
    table = torch.full((9, 10), unused, dtype=torch.int32, device=DEVICE)
    evictions = []
    for index, (policy, length, keep) in enumerate(rounds):
        pages = -(-length // PAGE)
        table[index + 2, :pages] = torch.tensor(before[index], dtype=torch.int32)
        dropped = pages - keep
        cache.ends[index] = length
        evictions.append(
            PageCompaction(
                request_id=str(index),
                length=length,
                keep=length - dropped * PAGE,
                evicted=dropped * PAGE,
                policy=policy,
                query_row=cache.rows[index] if NUM_QUERIES[policy] else NO_QUERY_ROW,
                num_queries=NUM_QUERIES[policy],
                eviction_id=index,
                protect=PROTECT if index % 2 else 0,
            )
        )

    tables = Tables({str(index): table[index + 2] for index in range(len(rounds))})
    compactor.run(evictions, tables)
    (step,) = compactor.take_evicted()
    reports = step.reports()
    assert compactor.take_evicted() == []

    for index, eviction in enumerate(evictions):
        pages, candidates = before[index], (eviction.length - WINDOW) // PAGE
        means = torch.zeros(candidates, dtype=torch.float64)
        for number, layer in enumerate(layers):
            tokens = layer[torch.tensor(pages, device=DEVICE)].transpose(0, 1).flatten(1, 2)
            inputs = ScoreInputs(
                keys=tokens[:, : eviction.length, :32],
                queries=cache.newest_queries(number, index, NUM_QUERIES[eviction.policy]),
                scale=scale,
                layer=number,
                logical_length=eviction.logical_length,
                rotary_pairs=pairs,
            )
            scores = policies[eviction.policy].scores(inputs).double().cpu()
            means += naive.page_scores(scores, PAGE)[:candidates] / (2 * 2 * PAGE)
        dropped = (eviction.length - eviction.keep) // PAGE
        means[: -(-eviction.protect // PAGE)] = math.inf
        leave = sorted(sorted(range(candidates), key=lambda page: (means[page].item(), -page))[:dropped])
        assert reports[index] == PageReport(str(index), index, tuple(pages[page] for page in leave))
        stay = [page for number, page in enumerate(pages) if number not in leave]
        assert table[index + 2, : len(stay)].tolist() == stay
        assert tables.num_pages[str(index)] == len(stay)
    assert (table[:2] == unused).all() and (table[len(rounds) + 2 :] == unused).all()
