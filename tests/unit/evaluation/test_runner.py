"""What is asked, in which order, what is kept, and how it is judged; on an engine that is a list."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from stub_engine import OUTPUT_TOKENS, PROMPT_TOKENS, StubEngine

from rkv_vllm.evaluation.answers import Answer, AnswerLog
from rkv_vllm.evaluation.engines import EngineError, check_in_force
from rkv_vllm.evaluation.runner import Job, Plan, judge, run
from rkv_vllm.evaluation.settings import FULL_CACHE, Setting, parse_budgets
from rkv_vllm.evaluation.summary import Row, rows_of
from rkv_vllm.evaluation.tasks import Decode, Problem


class Numbers:
    """A task whose answers are the questions."""

    max_tokens: int | None = None
    decode: Decode | None = None

    def __init__(self, opens_thinking: bool = False, judges_thinking: bool = False) -> None:
        self.opens_thinking = opens_thinking
        self.judges_thinking = judges_thinking

    def describe(self) -> dict[str, Any]:
        return {"name": "numbers"}

    def problems(self, count: int, seed: int) -> list[Problem]:
        return [
            Problem(str(i), str(i), lambda answer, i=i: answer == str(i))  # type: ignore[misc]
            for i in range(count)
        ]


def plan(budgets: str = "32", problems: int = 4, samples: int = 1, concurrency: int = 3) -> Plan:
    return Plan(parse_budgets(budgets), ["rkv", "random"], [8], [0], problems, samples, 0, concurrency)


def ask(
    engine: StubEngine, log: AnswerLog, asked: Plan, length: float | None = None, task: Numbers | None = None
) -> tuple[list[Setting], list[float], list[tuple[int, int]]]:
    """Returns the settings, the lengths that were measured, and the progress."""
    lengths: list[float] = []
    progress: list[tuple[int, int]] = []
    task = task or Numbers()
    settings = asyncio.run(
        run(engine, task, asked, log, length, lengths.append, lambda *now: progress.append(now))
    )
    return settings, lengths, progress


def echo(prompt: Any, setting: Setting) -> str:
    return str(prompt)


def rows(log: AnswerLog, settings: list[Setting]) -> dict[str, Row]:
    found = rows_of(settings, lambda setting: log.of(setting.name, map(str, range(4)), 1))
    return {row.setting: row for row in found}


def judged(tmp_path: Path, output: str, task: Numbers | None = None, **engine: Any) -> Answer:
    log = AnswerLog(tmp_path / "answers.jsonl")
    ask(StubEngine(lambda *_: output, **engine), log, plan(problems=1), task=task)
    [[answer]] = log.of("full", ["0"], 1)
    return answer


def test_settings_are_in_flight_together(tmp_path: Path) -> None:
    """Proves that all settings of a problem follow each other, and that no more run than are allowed."""
    engine = StubEngine(echo)
    settings, _, progress = ask(engine, AnswerLog(tmp_path / "answers.jsonl"), plan())
    assert [setting.name for setting in settings] == ["full", "rkv:32:8", "random:32:8"]
    assert [setting for _, setting, _ in engine.asked] == settings * 4
    assert engine.most_in_flight == 3
    assert progress[0] == (12, 0) and progress[-1] == (12, 12)


def test_settings_share_the_seeds_and_samples_do_not(tmp_path: Path) -> None:
    """Proves that settings differ in their caches alone, and that samples differ from each other."""
    engine = StubEngine(echo)
    ask(engine, AnswerLog(tmp_path / "answers.jsonl"), plan(samples=2))
    seeds: dict[Any, set[int]] = {}
    for prompt, _, seed in engine.asked:
        seeds.setdefault(prompt, set()).add(seed)
    assert [len(each) for each in seeds.values()] == [2] * 4
    assert len(set.union(*seeds.values())) == 8
    assert all(0 <= seed < 2**31 for each in seeds.values() for seed in each)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """Proves that answers are kept when the engine fails, and that only the others are asked for again."""
    path = tmp_path / "answers.jsonl"
    first = StubEngine(echo, fails_after=5)
    with pytest.raises(EngineError, match="out of order"):
        ask(first, AnswerLog(path), plan())
    kept = len(path.read_text().splitlines())
    assert kept >= 5 - 3
    second = StubEngine(echo)
    log = AnswerLog(path)
    settings, _, progress = ask(second, log, plan())
    assert len(second.asked) == 12 - kept
    assert progress[0] == (12, kept)
    assert all(row.answers == 4 for row in rows(log, settings).values())
    third = StubEngine(echo)
    ask(third, AnswerLog(path), plan(problems=5, samples=2))
    assert len(third.asked) == 5 * 2 * 3 - 12


def test_an_unfinished_last_line_is_asked_again(tmp_path: Path) -> None:
    """Proves that a line cut off by a kill is dropped, and that the file is whole afterwards."""
    path = tmp_path / "answers.jsonl"
    ask(StubEngine(echo), AnswerLog(path), plan())
    path.write_bytes(path.read_bytes()[:-20])
    engine = StubEngine(echo)
    log = AnswerLog(path)
    ask(engine, log, plan())
    log.close()
    assert len(engine.asked) == 1
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 12


def test_another_file_is_not_taken_for_answers(tmp_path: Path) -> None:
    """Proves that a file with something else in it is named, with the line."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question": "2 + 2"}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1"):
        AnswerLog(path)


def test_percent_is_of_the_measured_length(tmp_path: Path) -> None:
    """Proves that the full cache runs first where its length is needed, once, and not where it is given."""
    engine = StubEngine(echo)
    settings, lengths, progress = ask(engine, AnswerLog(tmp_path / "one.jsonl"), plan("50%,20"))
    assert lengths == [PROMPT_TOKENS + OUTPUT_TOKENS]
    assert [each.budget for each in settings] == [0, 50, 50, 20, 20]
    assert [each for _, each, _ in engine.asked[:4]] == [FULL_CACHE] * 4
    assert len(engine.asked) == 4 * 5
    assert {total for total, _ in progress} == {20}

    engine = StubEngine(echo)
    settings, lengths, _ = ask(engine, AnswerLog(tmp_path / "two.jsonl"), plan("50%"), length=60)
    assert lengths == [] and [each.budget for each in settings] == [0, 30, 30]
    assert [each for _, each, _ in engine.asked[:3]] == settings


def test_right_wrong_and_truncated(tmp_path: Path) -> None:
    """Proves that a right text that the limit cut off counts as wrong."""
    assert judged(tmp_path / "", "0").right
    (tmp_path / "a").mkdir()
    assert not judged(tmp_path / "a", "1").right
    (tmp_path / "b").mkdir()
    answer = judged(tmp_path / "b", "0", truncated=True)
    assert answer.truncated and not answer.right


@pytest.mark.parametrize(
    ("output", "opened", "right"),
    [
        ("<think>1</think>0", False, True),
        ("1</think>0", True, True),
        ("0</think>1", True, False),
        ("<think>0", False, False),
        ("0", True, False),
    ],
)
def test_only_what_follows_the_thinking_counts(
    tmp_path: Path, output: str, opened: bool, right: bool
) -> None:
    """Proves that thinking is no answer, whether the prompt or the model began it, by task or by template."""
    assert judged(tmp_path, output, opened_thinking=opened).right is right
    (tmp_path / "task").mkdir()
    assert judged(tmp_path / "task", output, task=Numbers(opens_thinking=opened)).right is right


@pytest.mark.parametrize(("output", "right"), [("0", True), ("0</think>0", False), ("1", False)])
def test_where_the_thinking_is_judged_its_end_does_not_matter(
    tmp_path: Path, output: str, right: bool
) -> None:
    """Proves that a task may look at all that was generated, cut off or not."""
    task = Numbers(opens_thinking=True, judges_thinking=True)
    assert judged(tmp_path, output, task=task, truncated=True).right is right


def test_other_settings_than_asked_for_stop_the_run(tmp_path: Path) -> None:
    """Proves that an engine that kept its full cache cannot pass for one that compacted."""
    engine = StubEngine(echo, used=FULL_CACHE)
    with pytest.raises(EngineError, match=r"asked for .*32, None, 'rkv', 8.*used .*'full'"):
        ask(engine, AnswerLog(tmp_path / "answers.jsonl"), plan())


@pytest.mark.parametrize("used", [Setting("rkv", 40, 8, auto=True), Setting("rkv", 32, 8)])
def test_another_minimum_than_asked_for_stops_the_run(used: Setting) -> None:
    """Proves that the minimum of budget auto is checked, and that a fixed budget is none."""
    asked = Setting("rkv", 32, 8, auto=True)
    generation = asyncio.run(StubEngine(echo, used=used).generate("0", asked, 0, None))
    with pytest.raises(EngineError, match=r"asked for .*'auto', 32, 'rkv', 8.*used .*(40|None), 'rkv'"):
        check_in_force(asked, generation)


def test_rows(tmp_path: Path) -> None:
    """Proves what a row says: shares, means, and pages against the full cache's."""
    log = AnswerLog(tmp_path / "answers.jsonl")
    engine = StubEngine(lambda prompt, setting: str(prompt) if setting.policy != "random" else "0")
    settings, _, _ = ask(engine, log, plan())
    full, rkv, random = rows(log, settings).values()
    assert (full.accuracy.value, full.share_of_kv, full.evicted_tokens, full.warning) == (1, 1, 0, None)
    assert (rkv.accuracy.value, random.accuracy.value) == (1, 0.25)
    assert (rkv.right, random.right) == (4, 1)
    assert (rkv.evicted_tokens, rkv.compacted, rkv.share_of_kv) == (68, 1, 0.4)
    assert rkv.output_tokens.value == OUTPUT_TOKENS
    assert rkv.warning is None


def test_a_row_of_budget_auto(tmp_path: Path) -> None:
    """Proves that it says how many switched, and at which mean length those that did."""
    log = AnswerLog(tmp_path / "answers.jsonl")
    settings, _, _ = ask(StubEngine(echo), log, plan("auto:32"))
    switched, whole = Setting("rkv", 32, 8, auto=True), Setting("rkv", 4096, 8, auto=True)
    for problem, used in (("4", switched), ("5", whole), ("6", whole), ("7", whole), ("8", whole)):
        generation = asyncio.run(StubEngine(echo, used=used).generate(problem, switched, 0, None))
        job = Job(switched, Problem(problem, problem, lambda answer: True), 0)
        log.add(judge(job, generation, Numbers()))
    names = [str(i) for i in range(9)]
    row = rows_of([FULL_CACHE, switched], lambda setting: log.of(setting.name, names, 1))[1]
    assert (row.setting, row.budget, row.min_budget) == ("rkv:auto:32:8", "auto", 32)
    assert (row.answers, row.compacted, row.full_cache_tokens, row.warning) == (9, 0.55556, 40, None)
    assert rows(log, settings)["random:auto:32:8"].full_cache_tokens == 40


def test_a_row_without_compaction_says_so(tmp_path: Path) -> None:
    """Proves that a budget above every length cannot be mistaken for one that was kept."""
    log = AnswerLog(tmp_path / "answers.jsonl")
    settings, _, _ = ask(StubEngine(echo), log, plan("4096"))
    _, rkv, random = rows(log, settings).values()
    assert rkv.full_cache_tokens is None
    assert rkv.warning == random.warning == "this row was NOT compacted: no token was evicted"
