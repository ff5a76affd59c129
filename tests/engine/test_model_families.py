"""Tiny models of every family in `docs/models.md`, with random weights, in real engines."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_process import ABOVE_ANY_LENGTH, PAGE_SIZE, Ask, Engine, Settings
from model_families import FAMILIES, TINY, WINDOW, Family
from support.identical import assert_bit_identical

LENGTH, TOKENS = 80, 60
BUDGET, BUFFER = 40, 16


@pytest.fixture
def engine(family: Family, tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(
        family.save(tmp_path / "model"), Settings(dummy_weights=True, pages=64, max_model_len=512)
    )
    yield engine
    engine.close()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_family(family: Family, engine: Engine) -> None:
    """A budget above a request's length changes not one bit of its answer; under a small budget the request
    is compacted as its counts say, and every page comes back. One token's features are the same anywhere."""
    prompt = random.Random(0).choices(range(3, TINY["vocab_size"]), k=LENGTH)
    small = {"rkv_budget": BUDGET, "rkv_buffer": BUFFER}
    engine.run([Ask([7] * LENGTH, 1, {"rkv_budget": 0})])
    same_token = engine.first_layer_keys(LENGTH)
    alone = engine.run([Ask(prompt, TOKENS, {"rkv_budget": 0})])
    above = engine.run([Ask(prompt, TOKENS, {"rkv_budget": ABOVE_ANY_LENGTH})])
    invariant = small | {"rkv_policy": "invariant"}
    both = engine.run([Ask(prompt, TOKENS, small), Ask(prompt[:50], TOKENS, invariant)])

    assert engine.rotary_pairs() == family.pairs
    # A model that adds positions to its embeddings has another key at each.
    if family.pairs.rotated and not family.varies:
        features = family.pairs.features(same_token)
        torch.testing.assert_close(features, features[:, :1].expand_as(features), rtol=1e-4, atol=1e-6)
        assert torch.allclose(same_token, same_token[:, :1], rtol=1e-3) == family.unrotated
    assert len(alone.answers[0].tokens) == TOKENS
    assert_bit_identical(above.answers, alone.answers)
    assert above.answers[0].result["compactions"] == 0
    for index, length in enumerate((LENGTH, 50)):
        answer = both.answers[index]
        # The first round comes at the prompt's end, or at budget + buffer; the last token is not computed.
        rounds = range(max(length, BUDGET + BUFFER), length + TOKENS - 1, BUFFER)
        assert len(answer.tokens) == TOKENS
        assert answer.result["compactions"] == both.compactions(index) == len(rounds) > 0
        assert answer.result["evicted_tokens"] == rounds[-1] - BUDGET
    windows = -(-WINDOW // PAGE_SIZE) + 1 if family.has_windows else 0
    assert both.steps[-1].pages[0] <= -(-(BUDGET + BUFFER) // PAGE_SIZE) + windows
