"""How many answers does budget "auto" lose by halves, as it comes down, and how many in one step?

    cd benchmarks && python -m policy_lab.halving --model PATH --task program --seed 2026 --out halving.json

Under mild pressure, requests of the task, all alike, share a pool that holds a part of their full caches.
When each is cut, and to how many tokens, is calculated for both rules by the scheduler's own decisions; a
sample of a rule's requests is then decoded with policy invariant, each on a problem of its own. Both rules
get the same problems, each with the request that is cut as late among those of its rule. The fixed budget is
beside them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from policy_lab.measure import judged, survivors
from policy_lab.pressure_schedules import RULES, Cut, Load, simulate
from policy_lab.ragged import RaggedDecoder
from policy_lab.settings import InvariantSettings, described
from rkv_vllm.evaluation.statistics import INTERVAL, Z, share
from rkv_vllm.evaluation.tasks import Problem, Task, make_task
from rkv_vllm.provenance import command_line

#: Tokens of a whole problem.
LENGTHS = {"derivation": 2097, "program": 2107}
SETTINGS = InvariantSettings()
BUFFER = 128
REQUESTS, LIVES = 64, 2
#: Cuts are moved to the next multiple, so that many rows are cut in the same step.
_STEPS = 8

Schedule = list[Cut]


def main() -> None:
    arguments = parse()
    task = make_task(arguments.task, {})
    problems = task.problems(arguments.problems, arguments.seed)
    prompt, length = len(problems[0].prompt), LENGTHS[arguments.task]
    minimum = round(length * arguments.percent / 100)
    rows: list[dict[str, Any]] = [{"share": None, "rule": "fixed"}]
    schedules: list[list[Schedule]] = [[fixed(prompt, minimum, length)] * len(problems)]
    for part in map(float, arguments.shares.split(",")):
        load = Load(REQUESTS, prompt, length, minimum, BUFFER, SETTINGS.queries, part)
        for name, rule in RULES.items():
            found = simulate(load, rule, LIVES, arguments.seed)
            schedules.append(sample(found, len(problems), arguments.seed))
            rows.append({"share": part, "rule": name})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = RaggedDecoder(arguments.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    right = decode(decoder, task, problems, [each for some in schedules for each in some], minimum)
    for place, row in enumerate(rows):
        row |= row_of(
            schedules[place], right[place * len(problems) : (place + 1) * len(problems)], prompt, length
        )
        print({name: row[name] for name in row if name not in ("by_problem", "first_cuts")}, flush=True)
    result = {
        "command": command_line("python", "-m policy_lab.halving"),
        "task": task.describe(),
        "settings": described(SETTINGS) | {"min_budget": minimum, "buffer": BUFFER},
        "seed": arguments.seed,
        "problems": len(problems),
        "interval": INTERVAL,
        "rows": rows,
        "halving_less_one_switch": [
            {"share": one["share"], **difference(one["by_problem"], half["by_problem"])}
            for one, half in zip(rows[1::2], rows[2::2], strict=True)
        ],
    }
    print(result["halving_less_one_switch"])
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m policy_lab.halving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama trained on the task")
    parser.add_argument("--task", choices=list(LENGTHS), required=True)
    parser.add_argument("--percent", type=float, default=24, help="of a whole problem: the minimum")
    parser.add_argument(
        "--shares", default="0.85,0.7", help="of their full caches, what all requests may fill together"
    )
    parser.add_argument("--problems", type=int, default=384)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    return parser.parse_args()


def fixed(prompt: int, budget: int, length: int) -> Schedule:
    """The cuts of a request with a fixed budget."""
    return [Cut(at, budget) for at in range(max(prompt, budget + BUFFER), length, BUFFER)]


def sample(schedules: Sequence[Schedule], count: int, seed: int) -> list[Schedule]:
    """So many of them, evenly from the one that is cut first to the last, in a random order that is the same
    for any rule."""
    ordered = sorted(schedules, key=lambda cuts: [(cut.at, cut.keep) for cut in cuts])
    # None comes first, and loses least.
    ordered.sort(key=lambda cuts: not cuts)
    chosen = [ordered[int((place + 0.5) * len(ordered) / count)] for place in range(count)]
    random.Random(seed).shuffle(chosen)
    return chosen


def decode(
    decoder: RaggedDecoder,
    task: Task,
    problems: Sequence[Problem],
    schedules: Sequence[Schedule],
    minimum: int,
) -> list[bool]:
    """Whether each schedule's problem is answered right; the problems repeat."""
    assert task.max_tokens is not None
    prompts = torch.tensor([problem.prompt for problem in problems], device=decoder.device)
    cuts: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by length: row, and tokens that stay
    for row, schedule in enumerate(schedules):
        for cut in schedule:
            cuts[-(-cut.at // _STEPS) * _STEPS].append((row, cut.keep))
    prompt = prompts.shape[1]
    tokens = decoder.start(prompts.repeat(len(schedules) // len(problems), 1), prompt + task.max_tokens + 1)
    written = [tokens]
    for logical in range(prompt, prompt + task.max_tokens - 1):
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, keep in cuts[logical]:
            alike[decoder.lengths[row], keep].append(row)
        for (_, keep), rows in alike.items():
            decoder.cut(rows, keep, partial(survivors, SETTINGS, decoder, keep))
        tokens = decoder.step(tokens)
        written.append(tokens)
    return judged(task, problems, torch.stack(written, dim=1))


def row_of(schedules: Sequence[Schedule], right: Sequence[bool], prompt: int, length: int) -> dict[str, Any]:
    """Of one rule under one load: what its requests kept, and how many answers were right.

    `held`: tokens that a request holds on average, of those it has; `first_cuts`: by problem, 0 for none.
    """
    estimate = share([[each] for each in right])
    firsts = [schedule[0] for schedule in schedules if schedule]
    return {
        "right": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "never_cut": 1 - len(firsts) / len(schedules),
        "first_cut": round(fmean(cut.at for cut in firsts), 1) if firsts else None,
        "first_keep": round(fmean(cut.keep for cut in firsts), 1) if firsts else None,
        "cuts": round(fmean(map(len, schedules)), 2),
        "held": round(fmean(held(schedule, prompt, length) for schedule in schedules), 4),
        "by_problem": "".join("01"[each] for each in right),
        "first_cuts": [schedule[0].at if schedule else 0 for schedule in schedules],
    }


def held(schedule: Schedule, prompt: int, length: int) -> float:
    """Tokens that a request holds over its life, in all, over those of a full cache."""
    slots, begun, total = prompt, prompt, 0.0
    for at, keep in [*((cut.at, cut.keep) for cut in schedule), (length, 0)]:
        total += (at - begun) * (slots + (at - begun) / 2)
        slots, begun = keep, at
    return total / ((length**2 - prompt**2) / 2)


def difference(one: str, other: str) -> dict[str, float]:
    """How much more often the other is right, by problem, with its normal 95 % interval."""
    by_problem = [int(b) - int(a) for a, b in zip(one, other, strict=True)]
    error = Z * stdev(by_problem) / len(by_problem) ** 0.5
    value = fmean(by_problem)
    return {"value": value, "low": value - error, "high": value + error}


if __name__ == "__main__":
    main()
