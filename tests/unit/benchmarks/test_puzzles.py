"""Puzzles of reasoning-gym with chains of thought: what the benchmark's model learns from, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from puzzles import train
from puzzles.chains import find_path, multiply, sort_numbers
from puzzles.check import greedy
from puzzles.lessons import IGNORED, Lessons, opened, solution
from puzzles.model import Llama, export, restore, shape
from puzzles.questions import HELD_OUT_SEED, LEARNED_SEED, PUZZLES, Puzzle
from puzzles.tokenizer import EOS, decode, encode, save, vocabulary
from transformers import AutoTokenizer, LlamaForCausalLM

from rkv_vllm.evaluation.tasks import Problem, make_task
from rkv_vllm.evaluation.tasks.reasoning_gym import PROMPT, ReasoningGymTask
from rkv_vllm.evaluation.thinking import after_thinking

EACH_PUZZLE = pytest.mark.parametrize("puzzle", PUZZLES.values(), ids=list(PUZZLES))


def problems(puzzle: Puzzle, smallest: int, count: int, seed: int = 5) -> list[tuple[str, Problem]]:
    """Questions, and what `rkv-vllm eval` makes of them."""
    task = ReasoningGymTask(puzzle.name, puzzle.of_sizes(smallest, puzzle.largest))
    around = PROMPT.partition("{question}")[2]
    made = task.problems(count, seed)
    return [(str(problem.prompt).removesuffix(around), problem) for problem in made]


@EACH_PUZZLE
def test_chains_end_in_the_right_answer(puzzle: Puzzle) -> None:
    """Proves that reasoning-gym's verifier gives chains of all sizes full marks, and altered ones none."""
    for question, problem in problems(puzzle, puzzle.smallest, 400):
        answer = after_thinking(solution(puzzle.solve(question)).removesuffix("<eos>"), opened=True)
        assert answer is not None and problem.is_right(answer), question
        assert not problem.is_right(answer.replace("<answer>", "<answer>9 "))


def test_lists_grow_by_one_number_and_stay_in_order() -> None:
    """Proves that each line of a sort is the list before it with the question's next number, by its name."""
    for question, _ in problems(PUZZLES["number_sorting"], 2, 100):
        numbers = re.findall(r"\d+\.\d", question.splitlines()[0])
        down = "descending" in question
        heading, named, *lines, result = sort_numbers(question).thinking.splitlines()
        assert heading == "numbers"
        assert named.split() == [f"{'abcdefghijklmn'[i]}{number}" for i, number in enumerate(numbers)]
        for length, line in enumerate(lines, 1):
            assert line.split()[1] == f"{named.split()[length - 1]}:"
            listed = [f"{item[1:]}{item[0]}" for item in named.split()[:length]]
            assert line.split()[2:] == sorted(listed, key=lambda item: item[:-1], reverse=down)
        assert len(lines) == len(numbers)
        assert result.replace(",", "").split()[1::2] == sorted(numbers, reverse=down)


def test_every_line_of_a_search_follows_from_the_grid() -> None:
    """Proves that each cell that is looked at has its mark, is new once only, and is not forgotten."""
    for question, _ in problems(PUZZLES["shortest_path"], 2, 100):
        grid = question.partition("following grid:\n")[2].split("\n")
        kinds = {
            f"{'bcdefgh'[r]}{c + 1}": kind for r, row in enumerate(grid) for c, kind in enumerate(row.split())
        }
        listed, _, searched = find_path(question).thinking.partition("search\n")
        assert dict(re.findall(r"(\w\d)([*#OX])", listed)) == kinds
        seen, queue = {cell for cell in kinds if kinds[cell] == "#"}, []
        lines = searched.splitlines()[:-1]
        for number, line in enumerate(lines):
            head, _, looked_at = line.partition(": ")
            assert (number == 0) or head == queue[number - 1]
            for cell, mark in re.findall(r"(\w\d)(\+\d\d|[-X|*])", looked_at):
                expected = (
                    "-" if cell in seen else {"O": "+", "X": "X", "*": "*"}.get(kinds.get(cell, ""), "|")
                )
                assert mark[0] == expected
                if mark[0] == "+":
                    queue.append(f"{mark[1:]} {cell}")
                if mark[0] in "+*":
                    seen.add(cell)
        assert len(lines) == len(queue) + 1


def test_every_product_and_every_sum_is_right() -> None:
    """Proves that each step of a multiplication is true, and takes its digits from where they stand."""
    for question, _ in problems(PUZZLES["products"], 1, 100):
        thinking = multiply(question).thinking
        digits = dict(re.findall(r"\b([a-zA-Z])(\d)\b", thinking.partition("rows")[0]))
        units = {}
        for name, left, right, carry, product in re.findall(r"(\w\w)(\d)\*(\d)\+(\d)=(\d\d)", thinking):
            assert [left, right] == [digits[each] for each in name]
            assert int(left) * int(right) + int(carry) == int(product)
            units[name] = product[-1]
        columns = re.findall(r"(\w):(\d) (.*) \1(\d)\n", thinking.partition("columns")[2])
        total = 0
        for _, carry, terms, digit in columns:
            assert int(carry) == total // 10
            total = int(carry)
            for name, unit, after in re.findall(r"(\w\w)(\d)=(\d\d)", terms):
                assert units.pop(name) == unit
                total += int(unit)
                assert total == int(after)
            assert int(digit) == total % 10
        assert not units  # each was summed


@pytest.mark.parametrize(
    ("solve", "question", "named"),
    [
        (sort_numbers, "Sort these words", "not a question that this solver knows"),
        (sort_numbers, f"Sort these numbers in ascending order: {', '.join('1' * 27)}\n", "27 numbers"),
        (find_path, "grid:\n" + "O O O O O O O O O\n" * 2, "2 x 9 cells"),
        (multiply, "the following multiplication: 123456789 * 12. Give", "more than 8 digits"),
    ],
)
def test_questions_that_have_no_chain_are_refused(solve: Any, question: str, named: str) -> None:
    """Proves that another dataset's question, or one too large for the names, gives no wrong chain."""
    with pytest.raises(ValueError, match=named):
        solve(question)


@EACH_PUZZLE
def test_chains_are_long_enough_for_small_budgets(puzzle: Puzzle) -> None:
    """Proves the lengths that budgets in percent are taken of: most of it is thinking, and all fits a row."""
    asked, answered = [], []
    for question, problem in problems(puzzle, puzzle.largest, 100):
        asked.append(len(encode(opened(str(problem.prompt)))))
        answered.append(len(encode(solution(puzzle.solve(question)))))
    assert 600 <= fmean(answered) <= max(answered) <= 1800
    assert max(asked) < fmean(answered) / 3


@EACH_PUZZLE
def test_evaluations_ask_the_largest_questions(puzzle: Puzzle) -> None:
    """Proves that the printed options are understood by the command line as the options meant here."""
    task, *options = puzzle.task[1::2]
    asked = make_task(task, dict(option.split("=") for option in options)).problems(3, seed=5)
    assert [each.prompt for each in asked] == [each.prompt for _, each in problems(puzzle, puzzle.largest, 3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save(folder)
    return AutoTokenizer.from_pretrained(folder)


@EACH_PUZZLE
def test_the_folders_tokenizer_reads_as_the_lessons_do(puzzle: Puzzle, tokenizer: Any) -> None:
    """Proves that what an evaluation sends through the chat template is what was learned, token for token,
    and that no character of questions and chains is lost."""
    for question, problem in problems(puzzle, puzzle.smallest, 50):
        messages = [{"role": "user", "content": problem.prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == opened(str(problem.prompt))
        text += solution(puzzle.solve(question))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == encode(text)
        assert tokenizer.decode(ids) == decode(ids) == text
    assert len(set(vocabulary())) == len(vocabulary()) == len(tokenizer)
    assert tokenizer.eos_token_id == EOS


def test_only_answers_are_learned() -> None:
    """Proves that labels are the ids that follow where the model writes, and nothing where it is asked."""
    for ids, labels in islice(Lessons(2560, {name: 3 for name in PUZZLES}, seed=1), 4):
        learned = labels != IGNORED
        assert ids.shape == labels.shape == (2560,)
        assert torch.equal(ids[1:][learned[:-1]], labels[:-1][learned[:-1]])
        text = decode(ids.tolist())
        answers = decode(labels[learned].tolist())
        assert "<user>" not in answers and "Give the final answer" not in answers
        for conversation in text.split("<bos>")[1:-1]:
            assert conversation.partition("<think>")[2] in answers


def test_what_is_learned_is_asked_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the seeds of lessons lie above those of checks, and those above an evaluation's, that no
    two workers or runs have the same, and that half of the questions are of the largest size."""
    drawn: list[tuple[int, dict[str, Any]]] = []

    class Dataset:
        def __init__(self, name: str, seed: int, size: int, **options: Any) -> None:
            self._seed, self._options = seed, options

        def __getitem__(self, index: int) -> dict[str, str]:
            drawn.append((self._seed + index, self._options))
            return {"question": "the following multiplication: 12 * 12. Give"}

    monkeypatch.setattr("puzzles.lessons.reasoning_gym.create_dataset", Dataset)
    for worker in (0, 1, 200):
        monkeypatch.setattr(
            "puzzles.lessons.get_worker_info", lambda worker=worker: type("", (), {"id": worker})
        )
        for seed in (0, 1):
            next(iter(Lessons(20_000, {"products": 7}, seed)))
    seeds = [seed for seed, _ in drawn]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= LEARNED_SEED > HELD_OUT_SEED + 1000 > 1 << 32
    assert 0.4 < fmean(options["min_digits"] == 7 for _, options in drawn) < 0.6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on many threads wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small() -> Iterator[Llama]:
    torch.manual_seed(0)
    yield Llama(shape(layers=2, heads=4, kv_heads=2))


def test_it_is_the_llama_of_transformers(small: Llama) -> None:
    """Proves that the exported weights mean in other libraries what they meant in training."""
    other = LlamaForCausalLM(small.config)
    other.load_state_dict(small.state_dict())
    ids = torch.randint(len(vocabulary()), (2, 300))
    with torch.inference_mode():
        torch.testing.assert_close(small(ids), other(ids).logits, rtol=1e-4, atol=1e-4)


def test_checks_write_what_a_model_without_a_cache_would(small: Llama) -> None:
    """Proves that greedy answers to prompts of different lengths are those of whole forward passes."""
    for weights in small.parameters():
        weights.data *= 3  # or it would repeat one token
    prompts = [encode("<bos><user>12 * 3<think>"), encode("<bos><user>Sort these<think>")]
    for prompt, text in zip(prompts, greedy(small, prompts, most_tokens=30), strict=True):
        ids = list(prompt)
        while len(ids) < 30 and ids[-1] != EOS:
            ids.append(int(small(torch.tensor([ids]))[0, -1].argmax()))
        assert text == decode(ids[len(prompt) :]).removesuffix("<eos>")


def test_a_trained_model_is_exported_in_pieces(tmp_path: Path) -> None:
    """Proves that the default model has 20 to 25 million parameters, and files that can be carried singly,
    and that training goes on from them."""
    model = Llama(shape(layers=8, heads=8, kv_heads=4))
    assert 20e6 < sum(weights.numel() for weights in model.parameters()) < 25e6
    export(model, tmp_path)
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 16 << 20
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    again = Llama(model.config)
    restore(again, tmp_path)
    for name, weights in model.state_dict().items():
        assert torch.equal(loaded[name], weights.bfloat16())
        assert torch.equal(again.state_dict()[name], weights.bfloat16().float())


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Proves that the command learns, checks and exports in one go: the loss of one-digit products falls."""
    monkeypatch.setattr(train, "REPORT_EVERY", 1)
    clock = count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second a look
    words = "train --seconds 80 --puzzles products=1 --layers 1 --heads 2 --kv-heads 1 --row 128 --rows 4"
    words += f" --workers 1 --check-seconds 50 --check-problems 1 --lr 0.003 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", words.split())
    train.main()
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < 0.8 * losses[0]
    assert said.count("right: products 0.0%") == 2  # on the way, and at the end
    assert (tmp_path / "chat_template.jinja").exists() and (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--puzzles chess=3", "--puzzles: there are no chess"),
        ("--puzzles products=0", "--puzzles: products begins with size 1"),
        ("--puzzles shortest_path=9", "--puzzles: a grid of 9 x 9 cells"),
        ("--puzzles products=7 --row 1000", "--row: the longest conversations have 1273 tokens"),
    ],
)
def test_what_cannot_be_learned_is_refused_at_once(
    options: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Proves that wrong sizes, and rows that would cut off every answer, are named before any training."""
    monkeypatch.setattr("sys.argv", f"train --out {tmp_path} {options}".split())
    with pytest.raises(SystemExit):
        train.main()
    assert named in capsys.readouterr().err
