"""How much the constants of policies rkv and invariant matter: each varied alone, all side by side.

Outside any engine, so that a constant that no server offers can be varied too; budget, buffer, window,
trigger and judgement are the engine's. Needs a GPU for more than a handful of problems, and a checkpoint
whose prompts all have the same length: those of `rkv-vllm eval --task derivation` and `--task program`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from policy_lab.decoder import Decoder
from policy_lab.measure import outcomes
from policy_lab.settings import BUFFERS, POLICIES, Settings, described, variations
from rkv_vllm.evaluation.statistics import INTERVAL, share
from rkv_vllm.evaluation.tasks import Problem, Task, make_task
from rkv_vllm.provenance import command_line

Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    task = make_task(arguments.task, {})
    problems = task.problems(arguments.problems, arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = Decoder(arguments.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    bases = [POLICIES[name]() for name in arguments.policy.split(",")]
    varied = [(each, *variation) for each in bases for variation in variations(each)]
    rows: list[Row] = []
    for budget in map(int, arguments.kv_budget.split(",")):
        rows += measure(decoder, task, problems, varied, budget, 128, arguments)
        if arguments.buffers:
            for buffer in BUFFERS:
                alone = [(each, f"buffer {buffer}", each) for each in bases]
                rows += measure(decoder, task, problems, alone, budget, buffer, arguments)
    rows += full_cache(decoder, task, problems, arguments.at_once)
    result = {
        "command": command_line("python", "-m policy_lab.sensitivity"),
        "task": task.describe(),
        "seed": arguments.seed,
        "problems": len(problems),
        "interval": INTERVAL,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m policy_lab.sensitivity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama trained on the task")
    parser.add_argument("--task", choices=["derivation", "program"], required=True)
    parser.add_argument("--kv-budget", required=True, help="tokens, comma separated")
    parser.add_argument("--policy", default="rkv,invariant", help="rkv, invariant, or both")
    parser.add_argument("--buffers", action="store_true", help="vary the buffer too, a batch each")
    parser.add_argument("--problems", type=int, default=192)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--at-once", type=int, default=2048, help="rows of a batch: settings times problems")
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    return parser.parse_args()


def measure(
    decoder: Decoder,
    task: Task,
    problems: Sequence[Problem],
    varied: Sequence[tuple[Settings, str, Settings]],
    budget: int,
    buffer: int,
    arguments: argparse.Namespace,
) -> list[Row]:
    """A row for each setting: what was varied of which base, and how many answers were right."""
    rows = []
    together = max(arguments.at_once // len(problems), 1)
    for first in range(0, len(varied), together):
        some, start = varied[first : first + together], time.perf_counter()
        found = outcomes(
            decoder,
            task,
            problems,
            [settings for _, _, settings in some],
            budget=budget,
            buffer=buffer,
            end_token=decoder.end_token,
        )
        for (_, change, settings), right in zip(some, found, strict=True):
            labels = {**described(settings), "changed": change, "budget": budget, "buffer": buffer}
            rows.append(row_of(labels, right))
        print(f"# {len(some)} settings in {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def full_cache(decoder: Decoder, task: Task, problems: Sequence[Problem], at_once: int) -> list[Row]:
    """The same problems without compaction, in batches whose caches have room."""
    right = []
    for first in range(0, len(problems), max(at_once // 2, 1)):
        some = problems[first : first + max(at_once // 2, 1)]
        (found,) = outcomes(decoder, task, some, [None], budget=0, buffer=0, end_token=decoder.end_token)
        right += found
    return [row_of({"policy": None, "changed": "", "budget": None, "buffer": None}, right)]


def row_of(labels: Row, right: Sequence[bool]) -> Row:
    estimate = share([[each] for each in right])
    print(
        f"{labels['policy'] or 'full cache':<10} {labels['budget'] or '':>5} {labels['changed']:<14} "
        f"{100 * estimate.value:5.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})",
        flush=True,
    )
    outcome = "".join("1" if each else "0" for each in right)  # of each problem, to compare in pairs
    return {
        **labels,
        "right": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "by_problem": outcome,
    }


if __name__ == "__main__":
    main()
