"""Everything that is published about accuracy on the derivation task, in one go on one GPU.

    python benchmarks/evaluate_derivation.py --model PATH --seed 2026 --out DIR

Runs `rkv-vllm eval` once for each policy, for buffers, and for each server-wide setting, all at the same
time: the model is small, and what takes time is the scheduler, on CPU cores of its own for each process. Each
process has rows of its own for the full cache. What was stopped goes on when the same command is given again;
--groups runs a part, and what earlier commands left in --work is published with it.

Budgets are in percent of a whole problem's tokens, which all problems have in common. DIR gets tables and one
JSON file of all runs, a plot for each group, and how long each run took; answers stay in the folder --work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rkv_vllm.evaluation.command import Merged
from rkv_vllm.evaluation.plot import draw
from rkv_vllm.evaluation.report import markdown
from rkv_vllm.evaluation.summary import Summary
from rkv_vllm.evaluation.tasks.derivation import make_derivation
from rkv_vllm.settings.config import POLICY_NAMES

VARIABLES, PASSES = 24, 6
ALL_BUDGETS, TWO_BUDGETS = "full,10%,16%,24%,37%", "full,24%,37%"
LAMBDAS = ("0", "0.01", "0.03", "0.3", "0.5", "1.0")
#: In flight in each process: the more, the fewer steps, which take turns on the GPU.
REQUESTS = 512
#: Of each process; a token takes 4 KiB. Where a third of the requests have full caches, all need 620,000.
KV_CACHE_BYTES = 5 << 29
ENGINE = (
    *("--max-model-len", "2304", "--max-num-seqs", str(REQUESTS)),
    *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
    *("--gpu-memory-utilization", "0.04"),  # only what has to be free at start: the line above sizes the pool
    *("--cudagraph-capture-sizes", "1", "32", "128", "256", "384", "448", "512"),
)
#: Processes at the same time, each with about 4 GiB of the GPU and two busy threads.
AT_ONCE = 16
#: In each group's plot and table beside its own runs: the default settings.
BASELINE = "policy-rkv"


@dataclass(frozen=True)
class Run:
    group: str
    name: str
    options: tuple[str, ...]


def runs() -> list[Run]:
    """In the order in which they start."""

    def run(group: str, name: str, budgets: str, *options: str, policy: str = "rkv") -> Run:
        return Run(group, name, ("--kv-budget", budgets, "--kv-policy", policy, *options))

    return [
        *(run("policies", f"policy-{policy}", ALL_BUDGETS, policy=policy) for policy in POLICY_NAMES),
        *(run("scope", f"scope-{each}", ALL_BUDGETS, "--kv-scope", each) for each in ("layer", "global")),
        *(
            run("buffers", f"buffers-{each}", f"full,{each}%", "--kv-buffer", "32,64,128,256")
            for each in (24, 37)
        ),
        *(run("lambda", f"lambda-{each}", TWO_BUDGETS, "--kv-mix-lambda", each) for each in LAMBDAS),
        run("order", "order-score", TWO_BUDGETS, "--kv-order", "score"),
    ]


def start(run: Run, args: argparse.Namespace, length: int) -> float | None:
    """Runs one to its end; returns its seconds, or None where it failed."""
    folder = args.work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "rkv_vllm.cli", "eval", "--task", "derivation", "--model", args.model),
        *("--task-option", f"variables={VARIABLES}", "--task-option", f"passes={PASSES}"),
        *("--problems", str(args.problems), "--seed", str(args.seed), "--full-length", str(length)),
        *("--concurrency", str(REQUESTS), "--out", str(folder), *run.options, *ENGINE),
    ]
    # Processes that compile the same model at the same time keep out of each other's files and cores.
    apart = {"VLLM_CACHE_ROOT": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with (folder / "log").open("wb") as log:
        status = subprocess.run(
            command, env={**os.environ, **apart}, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    seconds = time.monotonic() - started
    print(f"{run.name}: {'done' if status == 0 else f'FAILED ({status}), see {folder}/log'}, {seconds:.0f} s")
    sys.stdout.flush()
    return seconds if status == 0 else None


def publish(work: Path, out: Path) -> None:
    """Tables, plots and numbers of all runs that are complete."""
    done = {
        run.name: Summary.read(work / run.name)
        for run in runs()
        if (work / run.name / "summary.json").exists()
    }
    (out / "runs.json").write_text(Merged(runs=list(done.values())).model_dump_json(indent=1) + "\n")
    text = []
    for group in dict.fromkeys(run.group for run in runs()):
        names = [run.name for run in runs() if run.group == group and run.name in done]
        if not names:
            continue
        if BASELINE in done and BASELINE not in names:
            names = [BASELINE, *names]
        summaries = [done[name] for name in names]
        draw(summaries, out / f"{group}.svg")
        text.append(f"## {group}\n\n{markdown(summaries)}")
    (out / "tables.md").write_text("\n".join(text))


def main() -> int:
    groups = list(dict.fromkeys(run.group for run in runs()))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, required=True, help="of the problems")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, default=Path("/tmp/evaluate_derivation"))
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--groups", default=",".join(groups), help="default: %(default)s")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="processes; default: %(default)s")
    args = parser.parse_args()
    if unknown := set(args.groups.split(",")) - set(groups):
        parser.error(f"--groups: unknown: {', '.join(sorted(unknown))}")

    args.work = args.work / f"seed-{args.seed}-of-{args.problems}"
    chosen = [run for run in runs() if run.group in args.groups.split(",")]
    problem = make_derivation(random.Random(args.seed), VARIABLES, PASSES)
    length = len(problem.prompt_ids) + len(problem.solution_ids)
    with ThreadPoolExecutor(args.at_once) as pool:
        seconds = list(pool.map(lambda run: start(run, args, length), chosen))
    times = {run.name: each for run, each in zip(chosen, seconds, strict=True)}
    args.out.mkdir(parents=True, exist_ok=True)
    publish(args.work, args.out)
    (args.out / "seconds.json").write_text(json.dumps(times, indent=1) + "\n")
    return int(None in times.values())


if __name__ == "__main__":
    sys.exit(main())
