"""Everything that is published about accuracy on one task, in one go on one GPU.

    python benchmarks/accuracy.py derivation --model PATH --seed 2026 --out DIR
    python benchmarks/accuracy.py --plot policies.svg derivation/runs.json program/runs.json

Runs `rkv-vllm eval` once for each policy, for buffers, and for each server-wide setting, all at the same
time: the model is small, and what takes time is the scheduler, on CPU cores of its own for each process. Each
process has rows of its own for the full cache. What was stopped goes on when the same command is given again;
--groups runs a part, and what earlier commands left in --work is published with it. Other options go to the
engines.

Budgets are in percent of a whole problem's tokens. DIR gets tables and one JSON file of all runs, a plot for
each group, and how long each run took; answers stay in the folder --work. The second form draws the policies'
curves of several tasks side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from puzzles.questions import PUZZLES

from rkv_vllm.evaluation.command import Merged
from rkv_vllm.evaluation.plot import draw, draw_tasks
from rkv_vllm.evaluation.report import markdown
from rkv_vllm.evaluation.summary import Summary
from rkv_vllm.settings.policy_table import POLICY_NAMES

LAMBDAS = ("0", "0.01", "0.03", "0.3", "0.5", "1.0")
#: In flight in each process: the more, the fewer steps, which take turns on the GPU.
REQUESTS = 512
#: Where a third of the requests have full caches, all need 620,000 tokens; those take as many bytes.
KV_CACHE_TOKENS = 5 << 17
ENGINE = (
    *("--max-model-len", "2304", "--max-num-seqs", str(REQUESTS)),
    *("--gpu-memory-utilization", "0.04"),  # only what has to be free at start: the pool's size is given
    *("--cudagraph-capture-sizes", "1", "32", "128", "256", "384", "448", "512"),
)
#: Processes at the same time, each with about 4 GiB of the GPU and two busy threads.
AT_ONCE = 16
#: Groups whose runs differ in the policy.
BY_POLICY = ("policies", "protect")
#: In each group's plot and table beside its own runs: the default settings.
BASELINE = "policy-rkv"


@dataclass(frozen=True)
class Study:
    """A task, and how it is measured.

    Attributes:
        task: options of `rkv-vllm eval`.
        budgets: of policies and scopes.
        two: of everything else.
        length: mean tokens of a problem with its solution.
        token_bytes: of the KV cache, by the model that was trained for the task.
    """

    task: tuple[str, ...]
    budgets: tuple[int, ...]
    two: tuple[int, int]
    length: int
    token_bytes: int


STUDIES = {
    "derivation": Study(("--task", "derivation"), (10, 18, 24, 37), (24, 37), 2097, 4096),
    "program": Study(("--task", "program"), (18, 24, 37, 48), (24, 37), 2107, 8192),
    **{
        name: Study((*PUZZLES[name].task, "--max-tokens", "1536"), (24, 37, 60, 80), (37, 60), length, 8192)
        for name, length in (("number_sorting", 1539), ("shortest_path", 1456), ("products", 1273))
    },
}


@dataclass(frozen=True)
class Run:
    group: str
    name: str
    policy: str
    options: tuple[str, ...]


def runs(study: Study) -> list[Run]:
    """In the order in which they start."""

    def run(group: str, name: str, budgets: tuple[int, ...], *options: str, policy: str = "rkv") -> Run:
        percent = ",".join(["full", *(f"{budget}%" for budget in budgets)])
        return Run(group, name, policy, ("--kv-budget", percent, "--kv-policy", policy, *options))

    return [
        *(run("policies", f"policy-{policy}", study.budgets, policy=policy) for policy in POLICY_NAMES),
        *(
            run("protect", f"protect-{each}", study.two, "--kv-protect", "prompt", policy=each)
            for each in POLICY_NAMES
        ),
        *(run("scope", f"scope-{each}", study.budgets, "--kv-scope", each) for each in ("layer", "global")),
        *(run("buffers", f"buffers-{each}", (each,), "--kv-buffer", "32,64,128,256") for each in study.two),
        *(run("lambda", f"lambda-{each}", study.two, "--kv-mix-lambda", each) for each in LAMBDAS),
        run("order", "order-score", study.two, "--kv-order", "score"),
    ]


def start(run: Run, study: Study, args: argparse.Namespace, engine_arguments: Sequence[str]) -> float | None:
    """Runs one to its end; returns its seconds, or None where it failed."""
    folder = args.work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "rkv_vllm.cli", "eval", *study.task, "--model", args.model),
        *("--problems", str(args.problems), "--seed", str(args.seed), "--full-length", str(study.length)),
        *("--concurrency", str(REQUESTS), "--out", str(folder), *run.options, *ENGINE),
        *("--kv-cache-memory-bytes", str(KV_CACHE_TOKENS * study.token_bytes), *engine_arguments),
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


def publish(study: Study, work: Path, out: Path) -> None:
    """Tables, plots and numbers of all runs that are complete."""
    done = {
        run.name: Summary.read(work / run.name)
        for run in runs(study)
        if (work / run.name / "summary.json").exists()
    }
    (out / "runs.json").write_text(Merged(runs=list(done.values())).model_dump_json(indent=1) + "\n")
    text = []
    for group in dict.fromkeys(run.group for run in runs(study)):
        names = [run.name for run in runs(study) if run.group == group and run.name in done]
        if not names:
            continue
        if BASELINE in done and BASELINE not in names:
            names = [BASELINE, *names]
        summaries = [done[name] for name in names]
        draw(summaries, out / f"{group}.svg")
        text.append(f"## {group}\n\n{markdown(summaries)}")
    (out / "tables.md").write_text("\n".join(text))


def measure(args: argparse.Namespace, engine_arguments: Sequence[str]) -> int:
    """Runs what was asked for and publishes it; the exit status."""
    study = STUDIES[args.task]
    args.work = args.work / f"{args.task}-seed-{args.seed}-of-{args.problems}"
    policies = args.policies.split(",")
    chosen = [
        run
        for run in runs(study)
        if run.group in args.groups.split(",") and (run.policy in policies or run.group not in BY_POLICY)
    ]
    with ThreadPoolExecutor(args.at_once) as pool:
        seconds = list(pool.map(lambda run: start(run, study, args, engine_arguments), chosen))
    times = {run.name: each for run, each in zip(chosen, seconds, strict=True)}
    args.out.mkdir(parents=True, exist_ok=True)
    publish(study, args.work, args.out)
    (args.out / "seconds.json").write_text(json.dumps(times, indent=1) + "\n")
    return int(None in times.values())


def main() -> int:
    groups = list(dict.fromkeys(run.group for study in STUDIES.values() for run in runs(study)))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=STUDIES)
    parser.add_argument("--model", help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, help="of the problems")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--work", type=Path, default=Path("/tmp/accuracy"))
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--groups", default=",".join(groups), help="default: %(default)s")
    parser.add_argument(
        "--policies",
        default=",".join(POLICY_NAMES),
        help="of those groups that compare policies; default: all",
    )
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="processes; default: %(default)s")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="FILE", help="the plot, and files of runs")
    args, engine_arguments = parser.parse_known_args()
    if args.plot:
        merged = [Merged.model_validate_json(file.read_text()).runs for file in args.plot[1:]]
        draw_tasks({each[0].settings.task["name"]: each for each in merged}, args.plot[0])
        return 0
    if None in (args.task, args.model, args.seed, args.out):
        parser.error("a task, --model, --seed and --out are needed")
    if unknown := set(args.groups.split(",")) - set(groups):
        parser.error(f"--groups: unknown: {', '.join(sorted(unknown))}")
    if unknown := set(args.policies.split(",")) - set(POLICY_NAMES):
        parser.error(f"--policies: unknown: {', '.join(sorted(unknown))}")
    return measure(args, engine_arguments)


if __name__ == "__main__":
    sys.exit(main())
