"""The lab in which policies' constants are varied: its scores, its decoder, and what it counts as right."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from policy_lab.decoder import Decoder
from policy_lab.halving import held
from policy_lab.measure import outcomes, survivors
from policy_lab.pressure_schedules import PAGE, RULES, USAGE, Cut, Load, simulate
from policy_lab.ragged import RaggedDecoder
from policy_lab.scores import scores
from policy_lab.settings import InvariantSettings, RkvSettings, Settings, described, variations
from transformers import LlamaConfig, LlamaForCausalLM

from rkv_vllm.bench.modelless import VOCABULARY, ModellessEngine
from rkv_vllm.decisions.messages import plan_of
from rkv_vllm.evaluation.tasks import Problem
from rkv_vllm.kernels import naive, naive_invariant
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import invariant
from rkv_vllm.settings.config import POOL_KERNEL, SIMILARITY_THRESHOLD, WINDOW, RkvConfig
from rkv_vllm.settings.policy_table import POLICIES

ROWS, HEADS, GROUP, SIZE, LENGTH = 2, 2, 3, 16, 90
PROMPT, TOKENS = 20, 40
BASES: list[Settings] = [RkvSettings(), InvariantSettings()]


def test_the_bases_are_the_servers_policies() -> None:
    """Proves that what is varied starts from the constants that a server has."""
    table = {spec.name: spec for spec in POLICIES}
    rkv = RkvSettings(RkvConfig().mix_lambda, SIMILARITY_THRESHOLD, table["rkv"].num_queries, POOL_KERNEL)
    weight, queries = table["invariant"].weight, table["invariant"].num_queries
    assert isinstance(weight, float)
    assert [rkv, InvariantSettings(weight, queries, invariant.POOL_KERNEL)] == BASES


@pytest.mark.parametrize("base", BASES, ids=lambda base: described(base)["policy"])
def test_scores_equal_the_reference(base: Settings) -> None:
    """Proves the scores of the base and of each variation right, request by request, in float64."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(1, HEADS, 1, SIZE, generator=generator)
    keys = torch.randn(ROWS, HEADS, LENGTH, SIZE, generator=generator) + common
    values = torch.randn(ROWS, HEADS, LENGTH, SIZE, generator=generator)
    queries = torch.randn(ROWS, HEADS * GROUP, 32, SIZE, generator=generator)
    pairs = RotaryPairs(SIZE)
    for change, settings in variations(base):
        found = scores(settings, queries, keys, values, pairs, window=WINDOW)
        if change.startswith("values"):
            assert found.isfinite().all()
            continue
        for row in range(ROWS):
            looked_at = queries[row, :, -settings.queries :].double()
            constants: dict[str, Any] = {
                "window": WINDOW,
                "lam": settings.lam,
                "pool_kernel": settings.pool,
                "scale": SIZE**-0.5,
            }
            own = keys[row].double()
            if isinstance(settings, RkvSettings):
                expected = naive.rkv_scores(looked_at, own, threshold=settings.threshold, **constants)
            else:
                expected = naive_invariant.invariant_scores(looked_at, own, pairs, **constants)
            torch.testing.assert_close(found[row].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=49,
    )
    path = tmp_path_factory.mktemp("lab")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(0, 49, (3, PROMPT), generator=torch.Generator().manual_seed(1))


def next_tokens(folder: Path, ids: torch.Tensor, hidden: slice | None = None) -> torch.Tensor:
    """What transformers says comes behind each token, [rows, tokens]; later tokens do not see `hidden`."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    mask = torch.full((ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min).triu(1)
    if hidden is not None:
        mask[PROMPT:, hidden] = torch.finfo(torch.float32).min
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask.expand(ids.shape[0], 1, -1, -1)).logits
    found: torch.Tensor = logits.argmax(dim=-1)
    return found


@pytest.mark.parametrize("hidden", [None, slice(4, 9)], ids=["full cache", "evicted"])
def test_the_decoder_predicts_what_transformers_does(
    folder: Path, prompts: torch.Tensor, hidden: slice | None
) -> None:
    """Proves greedy decoding right, and that tokens which left are as if they were masked."""
    decoder = Decoder(folder, "cpu", torch.float32)
    written = [decoder.start(prompts, PROMPT + TOKENS)]
    if hidden is not None:
        stay = torch.tensor([slot for slot in range(PROMPT) if slot not in range(hidden.start, hidden.stop)])

        def choose(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            assert queries.shape[2] == keys.shape[2] == values.shape[2] == PROMPT
            return stay.expand(*keys.shape[:2], -1)

        decoder.keep(len(stay), [(slice(0, 2), choose), (slice(2, 3), choose)])
        assert decoder.used == len(stay)
    written += [decoder.step(written[-1]) for _ in range(1)]
    for _ in range(TOKENS - 2):
        written.append(decoder.step(written[-1]))
    ids = torch.cat((prompts, torch.stack(written, dim=1)), dim=1)
    expected = next_tokens(folder, ids, hidden)[:, PROMPT - 1 : -1]
    assert torch.equal(ids[:, PROMPT:], expected)


@dataclass
class Copy:
    """A task that is right where the model writes what it writes with its full cache."""

    max_tokens: int | None = TOKENS
    opens_thinking: bool = False
    judges_thinking: bool = True

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def test_settings_are_judged_apart(folder: Path, prompts: torch.Tensor) -> None:
    """Proves that each setting's answers are its own: all right in room enough, and changed by evictions."""
    decoder = Decoder(folder, "cpu", torch.float32)
    tokens = [decoder.start(prompts, PROMPT + TOKENS)]
    while len(tokens) < TOKENS:
        tokens.append(decoder.step(tokens[-1]))
    task: Any = Copy()
    answers = [task.decode(row) for row in torch.stack(tokens, dim=1).tolist()]
    problems = [
        Problem(str(row), prompts[row].tolist(), lambda text, answer=answer: text == answer)  # type: ignore[misc]
        for row, answer in enumerate(answers)
    ]
    everything: dict[str, Any] = {"end_token": -1}
    assert outcomes(decoder, task, problems, [None], budget=0, buffer=0, **everything) == [[True] * 3]
    wide = outcomes(decoder, task, problems, BASES, budget=50, buffer=16, **everything)
    assert wide == [[True] * 3] * 2
    tight = outcomes(decoder, task, problems, BASES, budget=10, buffer=8, **everything)
    assert tight != wide and [len(each) for each in tight] == [3, 3]
    alone = [
        outcomes(decoder, task, problems, [base], budget=10, buffer=8, **everything)[0] for base in BASES
    ]
    assert alone == tight
    unequal = [problems[0], Problem("longer", [1] * (PROMPT + 1), lambda text: True)]
    with pytest.raises(ValueError, match="differ in length"):
        outcomes(decoder, task, unequal, BASES, budget=10, buffer=8, **everything)


def test_rows_are_cut_on_schedules_of_their_own(folder: Path, prompts: torch.Tensor) -> None:
    """Proves that rows of different lengths, decoded side by side, write what each writes alone."""
    settings = InvariantSettings(queries=8)
    schedules = [[], [Cut(30, 15), Cut(40, 20)], [Cut(30, 22), Cut(41, 15)], [Cut(50, 15)], [Cut(30, 15)]]

    def written(decoder: RaggedDecoder, rows: list[int]) -> list[list[int]]:
        some = prompts[[row % len(prompts) for row in rows]]
        tokens = [decoder.start(some, PROMPT + TOKENS)]
        for logical in range(PROMPT, PROMPT + TOKENS - 1):
            keeps = [
                (place, cut.keep)
                for place, row in enumerate(rows)
                for cut in schedules[row]
                if cut.at == logical
            ]
            for place, keep in keeps:
                decoder.cut([place], keep, partial(survivors, settings, decoder, keep))
            tokens.append(decoder.step(tokens[-1]))
        return torch.stack(tokens, dim=1).tolist()

    ragged = RaggedDecoder(folder, "cpu", torch.float32)
    together = written(ragged, list(range(len(schedules))))
    assert ragged.lengths == [59, 20 + 19, 15 + 18, 15 + 9, 15 + 29]
    assert together == [written(ragged, [row])[0] for row in range(len(schedules))]
    assert len({tuple(row) for row in together}) == len(schedules)
    plain = Decoder(folder, "cpu", torch.float32)
    expected = [plain.start(prompts[[1]], PROMPT + TOKENS)]
    for _ in range(TOKENS - 1):
        keep = {30: 15, 25: 20}.get(plain.used) if len(expected) in (11, 21) else None
        if keep is not None:
            plain.keep(keep, [(slice(0, 1), partial(survivors, settings, plain, keep))])
        expected.append(plain.step(expected[-1]))
    assert torch.cat(expected).tolist() == together[1]


LOAD = Load(requests=24, prompt=60, length=600, minimum=140, buffer=32, queries=16, share=0.8)


@pytest.mark.parametrize("rule", RULES)
def test_cuts_are_those_of_a_pool_under_pressure(rule: str) -> None:
    """Proves that what requests hold fills the pool, by either rule, that halving keeps a half, and that a
    request at its minimum is cut whenever it has filled its buffer."""
    schedules = simulate(LOAD, RULES[rule], 2, 5)
    assert len(schedules) == 2 * LOAD.requests
    kept = fmean(held(schedule, LOAD.prompt, LOAD.length) for schedule in schedules)
    assert 0.72 < kept < 0.8
    for schedule in schedules:
        slots, at = LOAD.prompt, LOAD.prompt
        for place, cut in enumerate(schedule):
            slots, at = slots + cut.at - at, cut.at
            at_minimum = place > 0 and schedule[place - 1].keep == LOAD.minimum
            if at_minimum:
                assert (slots, cut.keep) == (LOAD.minimum + LOAD.buffer, LOAD.minimum)
            elif rule == "halving":
                assert cut.keep == max(slots // 2, LOAD.minimum)
            else:
                assert cut.keep == LOAD.minimum and place == 0
            slots = cut.keep


def test_halving_is_what_the_scheduler_does() -> None:
    """Proves the calculated switches near those of the real scheduler under the same load."""
    usable = int(LOAD.filled / USAGE)
    engine = ModellessEngine(
        {"budget": "auto", "min_budget": LOAD.minimum, "buffer": LOAD.buffer, "policy": "invariant"},
        pages=usable,
        page_size=PAGE,
        max_num_seqs=LOAD.requests,
        max_num_batched_tokens=8192,
        max_model_len=LOAD.length,
    )
    rng, asked, switched = random.Random(5), count(), dict[str, int]()

    def add(age: int) -> None:
        prompt = [rng.randrange(VOCABULARY) for _ in range(LOAD.prompt + age)]
        engine.add(str(next(asked)), prompt, LOAD.length - len(prompt))

    for _ in range(LOAD.requests):
        add(rng.randrange(LOAD.length - LOAD.prompt))
    for _ in range(4 * LOAD.length):
        for each in plan_of(engine.schedule()).rounds:
            switched.setdefault(each.request_id, each.logical_length)
        for answer in engine.update():
            if answer.finished:
                add(0)
    real = fmean(at for name, at in switched.items() if int(name) >= 2 * LOAD.requests)
    calculated = fmean(cuts[0].at for cuts in simulate(LOAD, RULES["halving"], 2, 5))
    assert calculated == pytest.approx(real, rel=0.03)
