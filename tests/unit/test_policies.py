"""The selection policies on small caches."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from rkv_vllm.kernels import naive, naive_invariant, tiled
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import ScoreInputs, invariant, make_policies, weights
from rkv_vllm.policies.recency import SINKS, Recency
from rkv_vllm.policies.rkv import Rkv
from rkv_vllm.settings.config import POOL_KERNEL, SIMILARITY_THRESHOLD, WINDOW, Order, PolicyName, RkvConfig
from rkv_vllm.settings.policy_table import KERNELS, NUM_QUERIES, POLICY_NAMES

POLICIES = make_policies(RkvConfig(mix_lambda=0.3))
HEADS, GROUP, SIZE = 2, 3, 16


def inputs(
    length: int, seed: int = 0, layer: int = 0, logical: int = 500, queries: int = WINDOW
) -> ScoreInputs:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(HEADS, 1, SIZE, generator=generator)  # so that some keys resemble each other
    return ScoreInputs(
        keys=torch.randn(HEADS, length, SIZE, generator=generator) + common,
        queries=torch.randn(HEADS * GROUP, queries, SIZE, generator=generator) if queries else None,
        scale=0.2,
        layer=layer,
        logical_length=logical,
    )


def test_every_name_has_a_policy() -> None:
    """Proves that what a request may ask for is what there is, for the type checker too."""
    assert tuple(POLICIES) == POLICY_NAMES == get_args(PolicyName)


def test_the_kernels_score_with_the_weight_of_the_class() -> None:
    """Proves that a policy which the kernels score has there the weight of importance that its class has."""
    found = weights(RkvConfig(mix_lambda=0.3))
    assert found == {"rkv": 0.3, "invariant": 0.4, "snapkv": 1.0} and found.keys() == KERNELS.keys()
    assert {name: policy.mix_lambda for name, policy in POLICIES.items() if isinstance(policy, Rkv)} == {
        "rkv": 0.3,
        "snapkv": 1.0,
    }


def test_policies_with_queries_are_scored_by_kernels() -> None:
    """Proves that no policy is given queries by a CPU that a GPU would not give it."""
    assert {name for name, count in NUM_QUERIES.items() if count} <= KERNELS.keys()


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("length", [WINDOW + 1, WINDOW + 3, 40, 257])
def test_shape(name: PolicyName, length: int) -> None:
    """Proves that each policy scores exactly the candidates, in float32, and needs no more than it says."""
    case = inputs(length, queries=NUM_QUERIES[name])
    scores = POLICIES[name].scores(case)
    assert scores.shape == (HEADS, length - WINDOW) == (HEADS, case.num_candidates)
    assert scores.dtype == torch.float32 and not scores.isnan().any()


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_bfloat16_keys(name: PolicyName) -> None:
    """Proves that a cache in half precision is scored in float32, close to the same keys in full."""
    case = inputs(64)
    assert case.queries is not None
    half = ScoreInputs(case.keys.bfloat16(), case.queries.bfloat16(), 0.2, 0, 500)
    full = ScoreInputs(half.keys.float(), case.queries.bfloat16().float(), 0.2, 0, 500)
    scores = POLICIES[name].scores(half)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, POLICIES[name].scores(full), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keep", [SINKS, SINKS + 1, 20])
def test_recency_keeps_sinks_and_the_newest(keep: int) -> None:
    """Proves that recency keeps the first tokens and the newest candidates, in every head."""
    chosen = tiled.select(POLICIES["recency"].scores(inputs(60)), keep)
    candidates = 60 - WINDOW
    expected = [*range(SINKS), *range(candidates - (keep - SINKS), candidates)]
    assert chosen.tolist() == [expected] * HEADS


@pytest.mark.parametrize("protect", [0, SINKS - 1, SINKS + 3])
@pytest.mark.parametrize("order", ["temporal", "score"])
def test_recency_remembers_ages_in_both_orders(order: Order, protect: int) -> None:
    """Proves over three rounds that the first and the newest tokens stay however survivors are laid out."""
    keep, buffer = 30, 12
    first = max(SINKS, protect)
    policy = Recency(order)
    positions = torch.arange(keep + buffer)
    for round_ in range(3):
        keys = torch.zeros(1, len(positions), SIZE)
        scores = policy.scores(ScoreInputs(keys, None, 1.0, 0, 500, keep if round_ else 0, protected=protect))
        positions = positions[naive.kept_indices(scores, keep, len(positions), order, protect)[0]]
        newest = keep + (round_ + 1) * buffer
        assert sorted(positions.tolist()) == [*range(first), *range(newest - keep + first, newest)]
        if order == "score":
            assert positions[first] == newest - WINDOW - 1
        positions = torch.cat((positions, torch.arange(newest, newest + buffer)))


def test_random_is_reproducible() -> None:
    """Proves that a replayed compaction draws the same, and layers, lengths and heads draw differently."""
    random = POLICIES["random"]
    first = random.scores(inputs(60, seed=1, layer=3, logical=700))
    assert torch.equal(first, random.scores(inputs(60, seed=2, layer=3, logical=700)))
    assert not torch.equal(first, random.scores(inputs(60, layer=4, logical=700)))
    assert not torch.equal(first, random.scores(inputs(60, layer=3, logical=701)))
    assert not torch.equal(first[0], first[1])
    assert first.min() >= 0 and first.max() < 1


def test_random_does_not_touch_the_global_generator() -> None:
    """Proves that compaction changes no sampled token by drawing from torch's own generator."""
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    POLICIES["random"].scores(inputs(60))
    assert torch.equal(torch.rand(4), expected)


def test_keydiff_is_its_formula() -> None:
    """Proves that keydiff is the negative cosine to the mean direction of all keys, in float64."""
    case = inputs(90)
    directions = case.keys.double() / case.keys.double().norm(dim=-1, keepdim=True)
    mean = directions.mean(dim=1)
    expected = -torch.einsum("hnd,hd->hn", directions, mean)[:, :-WINDOW]
    torch.testing.assert_close(POLICIES["keydiff"].scores(case).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "mix_lambda"), [("rkv", 0.3), ("snapkv", 1.0)])
@pytest.mark.parametrize("length", [WINDOW + 1, 50, 300])
def test_rkv_is_the_reference(name: PolicyName, mix_lambda: float, length: int) -> None:
    """Proves that rkv, and snapkv as its one end, equal the literal float64 reference."""
    case = inputs(length)
    assert case.queries is not None
    expected = naive.rkv_scores(
        case.queries.double(),
        case.keys.double(),
        window=WINDOW,
        lam=mix_lambda,
        threshold=SIMILARITY_THRESHOLD,
        pool_kernel=POOL_KERNEL,
        scale=case.scale,
    )
    torch.testing.assert_close(POLICIES[name].scores(case).double(), expected, rtol=1e-4, atol=1e-7)


def test_order_of_queries_does_not_matter() -> None:
    """Proves that the window may be handed over in ring order."""
    case = inputs(80)
    assert case.queries is not None
    turned = ScoreInputs(case.keys, case.queries.roll(3, dims=1), case.scale, case.layer, case.logical_length)
    for name in KERNELS:
        torch.testing.assert_close(POLICIES[name].scores(turned), POLICIES[name].scores(case))


@pytest.mark.parametrize("name", KERNELS)
def test_missing_queries_are_an_error(name: PolicyName) -> None:
    """Proves that missing queries are noticed and not scored around."""
    with pytest.raises(AssertionError, match="queries"):
        POLICIES[name].scores(inputs(60, queries=0))


@pytest.mark.parametrize("queries", [8, 32])
@pytest.mark.parametrize("length", [WINDOW + 1, 50, 300])
def test_invariant_is_the_reference(length: int, queries: int) -> None:
    """Proves that invariant equals the literal float64 reference, whose similarity matrix it does without."""
    case = replace(inputs(length, queries=queries), rotary_pairs=RotaryPairs(8))
    assert case.queries is not None
    expected = naive_invariant.invariant_scores(
        case.queries.double(),
        case.keys[:, :].double(),
        case.rotary_pairs,
        window=WINDOW,
        lam=0.4,
        pool_kernel=invariant.POOL_KERNEL,
        scale=case.scale,
    )
    found = POLICIES["invariant"].scores(case).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
