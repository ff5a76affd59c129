"""The parts of scores that a page shows, against the reference of the algorithm."""

from __future__ import annotations

import pytest
import torch

from rkv_vllm.inspection.explanation import NO_MATCH, explain, newest_match
from rkv_vllm.inspection.recorder import shares_below, slots_of_pages
from rkv_vllm.kernels import naive
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import ScoreInputs, make_policies
from rkv_vllm.policies.invariant import joint_scores
from rkv_vllm.settings.config import POOL_KERNEL, SIMILARITY_THRESHOLD, WINDOW, RkvConfig

HEADS, GROUP, LENGTH, SIZE = 2, 3, 90, 16


def inputs(num_queries: int) -> ScoreInputs:
    chance = torch.Generator().manual_seed(3)
    common = torch.randn(HEADS, 1, SIZE, generator=chance)
    return ScoreInputs(
        keys=torch.randn(HEADS, LENGTH, SIZE, generator=chance) + 0.5 * common,
        queries=torch.randn(HEADS * GROUP, num_queries, SIZE, generator=chance),
        scale=0.3,
        layer=0,
        logical_length=LENGTH,
        rotary_pairs=RotaryPairs(rotated=SIZE),
    )


def test_the_parts_of_policy_rkv_are_those_of_the_reference() -> None:
    """Importance and redundancy make the policy's score; a match is the reference's, or said to be none."""
    given = inputs(WINDOW)
    parts = explain("rkv", given)
    keys = given.keys[:, :].double()
    assert given.queries is not None and parts.match is not None
    assert parts.importance is not None and parts.redundancy is not None
    score = 0.1 * parts.importance - 0.9 * parts.redundancy
    expected = naive.rkv_scores(
        given.queries.double(),
        keys,
        window=WINDOW,
        lam=0.1,
        threshold=SIMILARITY_THRESHOLD,
        pool_kernel=POOL_KERNEL,
        scale=given.scale,
    )
    assert torch.allclose(score.double(), expected, atol=1e-7)
    similar = naive.similarity(keys)
    chosen = naive.newest_match(similar, threshold=SIMILARITY_THRESHOLD)[:, :-WINDOW]
    has_one = (similar > SIMILARITY_THRESHOLD).any(dim=-1)[:, :-WINDOW]
    assert has_one.any() and not has_one.all()
    assert torch.equal(parts.match, torch.where(has_one, chosen, NO_MATCH))


def test_the_parts_of_policy_invariant_make_its_score() -> None:
    """Joined as the specification joins them, they are what the policy's own class scores."""
    given = inputs(16)
    parts = explain("invariant", given)
    assert parts.importance is not None and parts.redundancy is not None and parts.match is None
    score = joint_scores(parts.importance, parts.redundancy, 0.4)
    expected = make_policies(RkvConfig())["invariant"].scores(given)
    assert torch.allclose(score, expected, atol=1e-5)


def test_a_policy_has_no_parts_that_it_does_not_look_at() -> None:
    """SnapKV weighs importance alone, and ages have neither."""
    snapkv = explain("snapkv", inputs(WINDOW))
    assert snapkv.importance is not None and snapkv.redundancy is None and snapkv.match is None
    assert explain("recency", inputs(WINDOW)).importance is None


def test_matches_do_not_depend_on_how_many_are_looked_for_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is searched in pieces."""
    keys = inputs(WINDOW).keys[:, :]
    whole = newest_match(keys, SIMILARITY_THRESHOLD)
    monkeypatch.setattr("rkv_vllm.inspection.explanation._TILE_ELEMENTS", 7 * LENGTH)
    assert torch.equal(newest_match(keys, SIMILARITY_THRESHOLD), whole)


def test_shares_are_of_what_is_lower() -> None:
    """Equals have the same share, and nothing has 100 %."""
    values = torch.tensor([[5.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert shares_below(values).tolist() == [[75, 0, 0, 50], [0, 0, 0, 0]]


def test_slots_of_the_pages_that_stay() -> None:
    """In order, and of a page that is filled in part no more than is filled."""
    before = torch.tensor([7, 3, 9, 4])
    assert slots_of_pages(before, torch.tensor([3, 4]), 4, 14).tolist() == [4, 5, 6, 7, 12, 13]
