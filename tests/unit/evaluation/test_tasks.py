"""Tasks: the same problems for the same seed, and verifiers that tell right from wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rkv_vllm.evaluation.tasks import make_task
from rkv_vllm.evaluation.tasks.derivation import VOCABULARY, decode, encode, make_derivation
from rkv_vllm.evaluation.tasks.program import make_program
from rkv_vllm.evaluation.thinking import after_thinking

#: Of `make_derivation(random.Random(0), 8, 1)`, as the model was trained on it.
PROMPT = "m:8  ;y:2  ;n=y-m;b=n*2;i=m+5;q=i+n;p=n*q;z=i-7?m,p,i,z#1"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [{"problem": f"What is {i} + {i}?", "solution": str(2 * i)} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_derivation_is_what_the_model_learned() -> None:
    """Proves that a known seed gives the known problem, in the known tokens."""
    problem = make_derivation(random.Random(0), 8, 1)
    assert problem.prompt == PROMPT
    assert decode(problem.prompt_ids) == f"<bos><user>{PROMPT}<think>"
    assert decode(problem.solution_ids).endswith(f"</think>{problem.answer}<eos>")
    assert len(VOCABULARY) == 57 and encode("".join(VOCABULARY)) == list(range(57))


@pytest.mark.parametrize(("variables", "passes"), [(5, 0), (24, 6), (26, 1)])
def test_derivations_answer_themselves(variables: int, passes: int) -> None:
    """Proves that every solution is accepted, any other answer is not, and all have the same lengths."""
    rng = random.Random(5)
    problems = [make_derivation(rng, variables, passes) for _ in range(20)]
    for problem in problems:
        answer = after_thinking(decode(problem.solution_ids), opened=True)
        assert answer is not None and problem.is_right(answer)
        wrong = answer.replace("<eos>", "")[:-1] + str((int(problem.answer[-1]) + 1) % 10)
        for other in (wrong, wrong[:-2], "", answer[:-6], f"{answer[:-5]},", "?"):
            assert not problem.is_right(other), other
    assert len({len(problem.prompt_ids) for problem in problems}) == 1
    assert len({len(problem.solution_ids) for problem in problems}) == 1


def test_derivation_reads_tokens_beyond_its_vocabulary() -> None:
    """Proves that a model that samples an unused id gets a wrong answer, not an error."""
    assert decode([5, 63]) == "</think>?"


def test_derivation_leaves_room_for_detours() -> None:
    """Proves that the limit on tokens is above the longest solution, which is 1,941 tokens."""
    task = make_task("derivation", {})
    assert task.max_tokens == 2048
    small = make_task("derivation", {"variables": "8", "passes": "0"})
    assert small.max_tokens is not None and small.max_tokens < 512


@pytest.mark.parametrize("name", ["derivation", "jsonl", "reasoning-gym:chain_sum"])
def test_more_problems_begin_with_the_same(name: str, questions: Path) -> None:
    """Proves that a run can be extended, and that another seed gives other problems."""
    options = {"question": "problem", "answer": "solution"} if name == "jsonl" else {}
    task = make_task(f"jsonl:{questions}" if name == "jsonl" else name, options)
    few, many, others = task.problems(4, 1), task.problems(12, 1), task.problems(4, 2)
    assert [each.prompt for each in many[:4]] == [each.prompt for each in few]
    assert [each.prompt for each in others] != [each.prompt for each in few]
    assert len({each.name for each in many}) == 12


def test_jsonl(questions: Path) -> None:
    """Proves that fields, template and matching are those asked for, and that a file ends where it ends."""
    options = {"question": "problem", "answer": "solution", "match": "numeric", "prompt": "Q: {question} A:"}
    task = make_task(f"jsonl:{questions}", options)
    problems = task.problems(100, 0)
    assert len(problems) == 20
    [problem] = [each for each in problems if each.prompt == "Q: What is 7 + 7? A:"]
    assert problem.is_right("It is 14.") and not problem.is_right("It is 15.") and not problem.is_right("")


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    """Proves that separators which only Unicode calls line ends may stand in a question."""
    path = tmp_path / "questions.jsonl"
    path.write_bytes('{"question": "a\u2028b\x85c", "answer": 1}\r\n'.encode())
    [problem] = make_task(f"jsonl:{path}", {}).problems(9, 0)
    assert problem.prompt == "a\u2028b\x85c"


def test_another_file_is_another_task(questions: Path) -> None:
    """Proves that a changed file cannot be mixed into an old run."""
    options = {"question": "problem", "answer": "solution"}
    before = make_task(f"jsonl:{questions}", options).describe()
    questions.write_text(questions.read_text().replace("19", "18"))
    assert make_task(f"jsonl:{questions}", options).describe() != before


@pytest.mark.parametrize(
    ("line", "options", "named"),
    [
        ("{", {}, "line 1: "),
        ('{"question": "x"}', {}, "line 1: has no field 'answer'"),
        ("[1]", {}, "line 1: has no field 'question'"),
        ('{"question": "x", "answer": [1]}', {}, "answer takes text or a number"),
        ('{"question": "x", "answer": true}', {}, "answer takes text or a number"),
        ('{"question": "x", "answer": "one"}', {"match": "numeric"}, "answer ends with no number"),
        ("", {}, "holds no question"),
        ("", {"match": "best"}, "task-option match: "),
        ("", {"prompt": "Answer!"}, "prompt: has no {question}"),
        ("", {"temperature": "1"}, "task-option temperature: "),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, line: str, options: dict[str, str], named: str
) -> None:
    """Proves that a user sees which line, field or option it is."""
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError) as error:
        make_task(f"jsonl:{path}", options)
    assert named in str(error.value)


def test_a_program_is_judged_by_its_registers() -> None:
    """Proves that the state after the asked steps decides, whatever follows and wherever the text ends."""
    for seed in range(20):
        program = make_program(random.Random(seed), lines=8, registers=6, steps=30)
        assert (len(program.prompt_ids), len(program.trace_ids)) == (8 * 8 + 6 * 4 + 4 * 2 + 3, 30 * 20)
        steps = program.trace.split(".")[:-1]
        assert program.is_right(program.trace)
        assert program.is_right(program.trace + "</think>nonsense")
        assert program.is_right(program.trace + "#ab=c+d c:1 d:")
        assert not program.is_right(".".join(steps[:-1]) + "."), "a step is missing"
        assert not program.is_right(program.trace.replace("#", "", 1)), "a step cannot be read"
        assert not program.is_right("</think>" + program.trace)
        last = {name: step for step in steps if "=" in step for name in program.asked if step[2] == name}
        if last:
            wrong = next(iter(last.values()))
            other = wrong[:-1] + str((int(wrong[-1]) + 1) % 10)
            assert not program.is_right(program.trace[::-1].replace(wrong[::-1], other[::-1], 1)[::-1])


def test_a_program_visits_most_of_its_lines() -> None:
    """Proves that no problem is a loop of a few lines, and that jumps are taken and not taken."""
    programs = [make_program(random.Random(seed), lines=16, registers=12, steps=96) for seed in range(10)]
    for program in programs:
        assert len({step[1] for step in program.trace.split(".")[:-1]}) >= 0.6 * 16
    text = "".join(program.trace for program in programs)
    assert "?:y" in text and "?:n" in text


def test_the_program_task_gives_room_for_every_step() -> None:
    """Proves that a right trace is not cut off, and that problems are the same for the same seed."""
    task = make_task("program", {"lines": "10", "registers": "8", "steps": "40"})
    assert task.judges_thinking and task.max_tokens == 40 * 20
    first, again, other = (task.problems(3, seed) for seed in (1, 1, 2))
    assert [each.prompt for each in first] == [each.prompt for each in again]
    assert [each.prompt for each in first] != [each.prompt for each in other]


def test_reasoning_gym() -> None:
    """Proves that the package's own verifier decides, with and without the tags that the prompt asks for."""
    task = make_task("reasoning-gym:chain_sum", {"min_terms": "2", "max_terms": "3"})
    problem = task.problems(1, seed=1)[0]
    assert isinstance(problem.prompt, str) and "<answer>" in problem.prompt
    question = problem.prompt.partition(": ")[2].partition(" =")[0]
    right = sum(int(term) for term in question.replace("- ", "-").replace("+ ", "").split())
    assert problem.is_right(str(right))
    assert problem.is_right(f"So <answer>5</answer>, no: <answer> {right} </answer>")
    for wrong in (f"<answer>{right + 1}</answer>", "", "<answer></answer>", f"<answer>{right}", "9" * 5000):
        assert not problem.is_right(wrong), wrong


def test_verifiers_that_raise_call_it_wrong() -> None:
    """Proves that an answer that a verifier of the package cannot read does not end a run."""
    for name in ("prime_factorization", "game_of_life"):
        [problem] = make_task(f"reasoning-gym:{name}", {}).problems(1, seed=3)
        for answer in ("", "{", "[1,", "nan", '{"a": 1}', "\x00"):
            assert not problem.is_right(answer)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("math500", {}, "task: takes derivation"),
        ("jsonl", {}, "task: takes derivation"),
        ("reasoning-gym:", {}, "task: takes derivation"),
        ("reasoning-gym:nothing", {}, "no dataset 'nothing'"),
        ("reasoning-gym:chain_sum", {"min_terms": "9", "max_terms": "2"}, "task-option: "),
        ("reasoning-gym:chain_sum", {"sugar": "1"}, "task-option: "),
        ("derivation", {"variables": "27"}, "task-option variables: "),
        ("derivation", {"passes": "many"}, "task-option passes: "),
        ("program", {"lines": "26"}, "task-option lines: "),
        ("program", {"registers": "3"}, "task-option registers: "),
    ],
)
def test_a_wrong_task_is_named(name: str, options: dict[str, str], named: str) -> None:
    """Proves that unknown tasks and options end in one line that names them."""
    with pytest.raises(ValueError) as error:
        make_task(name, options)
    assert named in str(error.value)
