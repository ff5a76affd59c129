"""Models whose layers have windows beside full attention, each as a small one of random weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_process import ABOVE_ANY_LENGTH, Answer, Ask, Engine, Settings
from support.identical import assert_alike, assert_bit_identical
from support.window_models import SHAPES, VOCABULARY, recency_mask, save_checkpoint, teach

PROMPT, TOKENS = 200, 260
BUDGET, BUFFER = 96, 32
SMALL = {"rkv_budget": BUDGET, "rkv_buffer": BUFFER}
FULL_CACHE = {"rkv_budget": 0}
SETTINGS = Settings(skip_tokenizer=True)
#: Of log-probabilities, against transformers: Gemma 4 caps logits, which takes another kernel's exponential.
WITHIN = {"Gemma 4": 1e-3, "Gemma 4, shared": 1e-3}
#: Share of the pages that requests would hold at the same time, in which some have to be preempted.
TIGHT = {"Llama 4": 0.4}


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


@dataclass(frozen=True)
class Served:
    """A model, and the engine that runs it with R-KV."""

    shape: str
    folder: Path
    engine: Engine


StartOther = Callable[[Settings], Engine]


@pytest.fixture(scope="module", params=SHAPES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_checkpoint(request.param, tmp_path_factory.mktemp("window") / "model")
    engine = Engine(folder, SETTINGS)
    yield Served(request.param, folder, engine)
    engine.close()


@pytest.fixture
def start_other(served: Served) -> Iterator[StartOther]:
    """Starts other engines of the same model."""
    started: list[Engine] = []

    def start(settings: Settings) -> Engine:
        started.append(Engine(served.folder, settings))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def test_the_doctor_knows_the_groups(served: Served) -> None:
    """Proves that the groups which sizes are reckoned with are those that vLLM makes of the loaded model, up
    to layers that pad a group, and that which of its layers have other heads is seen in the config."""
    planned, made = served.engine.planned_and_made_groups()
    assert sorted(planned) == sorted(made)


def test_budget_above_the_length_is_stock(served: Served, start_other: StartOther) -> None:
    """Proves that tokens and log-probabilities are stock vLLM's to the last bit where nothing is due, also
    where the prefix cache gives a part."""
    stock = start_other(Settings(skip_tokenizer=True, rkv=False))
    asks = [
        Ask(prompt(0), TOKENS),
        Ask(prompt(1, 90), TOKENS),
        Ask(prompt(0) + prompt(2, 50), 20, arrives_at=9),
    ]
    above = [
        Ask(ask.prompt, ask.max_tokens, {"rkv_budget": ABOVE_ANY_LENGTH}, ask.arrives_at) for ask in asks
    ]
    expected, found = stock.run(asks), served.engine.run(above)
    assert_bit_identical(found.answers, expected.answers)
    assert [answer.cached_tokens for answer in found.answers] == [
        answer.cached_tokens for answer in expected.answers
    ]


def test_only_full_attention_forgets(served: Served) -> None:
    """Proves against one pass of transformers over the whole text that layers of full attention see what a
    round has left, whichever group their pages are in, and that windows see what they always did."""
    compacted, full = served.engine.run(
        [Ask(prompt(0), TOKENS, SMALL | {"rkv_policy": "recency"}), Ask(prompt(1), TOKENS, FULL_CACHE)]
    ).answers
    rounds = range(PROMPT, PROMPT + TOKENS - 1, BUFFER)
    assert compacted.result["compactions"] == len(rounds)
    difference = _difference(served, prompt(0), compacted, rounds)
    assert difference <= WITHIN.get(served.shape, 1e-4)
    assert _difference(served, prompt(1), full, []) <= WITHIN.get(served.shape, 1e-4)
    assert _difference(served, prompt(0), compacted, [], greedy=False) > 0.05, "compaction changes nothing"


def _difference(
    served: Served, asked: list[int], answer: Answer, rounds: range | list[int], greedy: bool = True
) -> float:
    """The largest distance of log-probabilities from those of a model that sees the same."""
    text = asked + answer.tokens
    logprobs = teach(served.folder, text, recency_mask(len(text), rounds, BUDGET))[len(asked) - 1 : -1]
    assert not greedy or logprobs.argmax(dim=-1).tolist() == answer.tokens
    given = logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    return (given - torch.tensor(answer.logprobs)).abs().max().item()


def test_preempted_requests_come_back_the_same(served: Served, start_other: StartOther) -> None:
    """Proves that a request which loses all its pages computes its rounds again, and windows with them."""
    rkv = SMALL | {"rkv_policy": "rkv"}
    asks = [
        *(Ask(prompt(index, 150), 200, rkv if index % 2 else SMALL) for index in range(6)),
        Ask(prompt(6, 120), 260, FULL_CACHE),
    ]
    alone = served.engine.run(asks)
    pages = int(alone.most_pages() * TIGHT.get(served.shape, 0.5))
    tight = start_other(Settings(skip_tokenizer=True, pages=pages, max_model_len=384, step_tokens=64))
    crowded = tight.run(asks)
    assert crowded.preemptions() > 0
    assert_alike(crowded.answers, alone.answers)
    for index in range(6):
        # Those who came back have computed their rounds again.
        assert crowded.compactions(index) >= alone.compactions(index) > 0
        assert crowded.answers[index].result["compactions"] == alone.compactions(index)


def test_what_follows_a_round_is_in_nobodys_cache(served: Served, start_other: StartOther) -> None:
    """Proves that a request with its full cache, on the text of a compacted one, finds none of the pages that
    were computed after that one's first round: also windows then hold approximations."""
    engine = start_other(Settings(skip_tokenizer=True, dense_retention=True))
    first = engine.run([Ask(prompt(0), TOKENS, SMALL)]).answers[0]
    text = prompt(0) + first.tokens
    again = engine.run([Ask(text, 40, FULL_CACHE)], keep_prefix_cache=True).answers[0]
    [expected] = engine.run([Ask(text, 40, FULL_CACHE)]).answers
    assert again.cached_tokens is not None and 0 < again.cached_tokens <= PROMPT
    assert_alike([again], [expected])


def test_hits_leave_the_queries_that_a_round_needs(served: Served) -> None:
    """Proves that a prompt which the prefix cache has whole is compacted as one that it has not: what is hit
    is looked up again where a round needs more of it computed."""
    asks = [Ask(prompt(0), 60, SMALL)]
    [expected] = served.engine.run(asks).answers
    [found] = served.engine.run(asks, keep_prefix_cache=True).answers
    assert found.cached_tokens and not expected.cached_tokens
    assert_alike([found], [expected])
    assert found.result["compactions"] == expected.result["compactions"] > 0


def test_results_count_the_pages_of_all_groups(served: Served) -> None:
    """Proves that a result tells of as many pages as the request held, or one a group fewer."""
    run = served.engine.run([Ask(prompt(0), TOKENS, SMALL)])
    held = max(step.pages.get(0, 0) for step in run.steps)
    [answer] = run.answers
    assert held - 4 <= answer.result["peak_pages"] <= held + 4
    assert answer.result["pages_without_compaction"] > answer.result["peak_pages"]
