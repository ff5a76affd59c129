"""Does a load go on as it was in the windows that `rkv-vllm bench` measured? Without a GPU.

    python benchmarks/long_run.py RESULTS.json --row "16K budget 1024" --json long-run.json

vLLM's real scheduler and ours get the load that was measured, with a made-up model, and go on with it for
whole lives of its requests. How long a step takes is calculated: the floor of what it computes, as many times
as the measured windows were above theirs, and the prompts in it at the rate of a large matrix product.

Windows of some seconds see requests of all ages at first. What they cannot see is how the numbers of
young and old ones change when the pool is full: stock vLLM admits new requests into every free page,
and preempts them again as those that run grow.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from rkv_vllm.bench.load import Load, LoadRequest, requests_that_run
from rkv_vllm.bench.modelless import VOCABULARY, ModellessEngine
from rkv_vllm.bench.results import EngineFacts, Results, merge, read_results
from rkv_vllm.bench.roofline import HardwareLimits, attention_seconds, matmul_seconds
from rkv_vllm.bench.rows import Kind, Row
from rkv_vllm.bench.window import Window
from rkv_vllm.provenance import command_line

#: Stretches that are shown: seconds from the first step without a prompt.
EARLY = ((0, 15), (15, 30), (30, 60), (60, 120))


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of a step. `above_floor`: by how much the windows were slower than their floors."""

    facts: EngineFacts
    limits: HardwareLimits
    above_floor: float = 1.0

    def __call__(self, requests: float, slots: float, prompt_tokens: float) -> float:
        return self.above_floor * self.decode(requests, slots) + self.prompts(prompt_tokens)

    def decode(self, requests: float, slots: float) -> float:
        """The floor of a token for each request."""
        shape = self.facts.shape
        matmul = matmul_seconds(shape, self.limits, requests)
        return 1000 * (matmul + attention_seconds(shape, self.limits, slots))

    def prompts(self, tokens: float) -> float:
        """Their matrix products, at the rate of a large one."""
        operations = 2 * self.facts.shape.multiplied_parameters * tokens
        return 1000 * operations / self.limits.operations_per_second

    def fitted(self, windows: list[Window]) -> StepTime:
        """With the median over windows of measured over calculated time, prompts aside."""
        ratios = []
        for window in windows:
            slots = window.pages_per_request * self.facts.page_size * window.running
            prompt_tokens = (window.prompt_tokens + window.recomputed_tokens) / window.steps
            decode = window.step_milliseconds - self.prompts(prompt_tokens)
            ratios.append(decode / self.decode(window.running, slots))
        return StepTime(self.facts, self.limits, median(ratios))


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    milliseconds: float
    tokens: int
    running: int
    preemptions: int
    prompt_tokens: int
    slots: int


def simulate(row: Row, kind: Kind, step_time: StepTime, steps: int) -> list[SimulatedStep]:
    """From the first step without a prompt on."""
    facts, budget = step_time.facts, row.budget_for(kind)
    rkv = None if kind == "stock" else {"budget": row.budget, "buffer": row.buffer, "policy": row.policy}
    engine = ModellessEngine(
        rkv,
        pages=facts.pool_pages,
        page_size=facts.page_size,
        max_num_seqs=facts.max_num_seqs,
        max_num_batched_tokens=facts.max_num_batched_tokens,
        max_model_len=row.length,
        asynchronous=facts.async_scheduling,
    )
    rng = random.Random(row.seed)
    pool = engine.scheduler.kv_cache_manager.block_pool
    fit = requests_that_run(row, budget, facts.pool_pages, facts.page_size, facts.max_num_seqs)
    load = Load(row, kind, fit)

    def add(request: LoadRequest) -> None:
        prompt = rng.choices(range(VOCABULARY), k=request.prompt_tokens)
        engine.add(str(request.index), prompt, request.output_tokens)

    for request in load.first:
        add(request)
    simulated: list[SimulatedStep] = []
    while len(simulated) < steps:
        output = engine.schedule()
        prompt_tokens = sum(count - 1 for count in output.num_scheduled_tokens.values())
        slots = (facts.pool_pages - pool.get_num_free_blocks()) * facts.page_size
        answers = engine.update()
        for answer in answers:
            if answer.finished:
                add(load.next())
        if simulated or prompt_tokens == 0:
            requests = len(output.num_scheduled_tokens)
            simulated.append(
                SimulatedStep(
                    milliseconds=step_time(requests, slots, prompt_tokens),
                    tokens=sum(len(answer.new_token_ids) for answer in answers),
                    running=len(engine.scheduler.running),
                    preemptions=len(output.preempted_req_ids or ()),
                    prompt_tokens=prompt_tokens,
                    slots=slots,
                )
            )
    return simulated


def summary(steps: list[SimulatedStep]) -> dict[str, float]:
    seconds = sum(step.milliseconds for step in steps) / 1000
    return {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(step.tokens for step in steps) / seconds, 1),
        "running": round(fmean(step.running for step in steps), 1),
        "step_milliseconds": round(1000 * seconds / len(steps), 2),
        "preemptions": sum(step.preemptions for step in steps),
        "prompt_tokens_per_step": round(fmean(step.prompt_tokens for step in steps), 1),
        "slots": round(fmean(step.slots for step in steps)),
    }


def stretches(steps: list[SimulatedStep]) -> dict[str, dict[str, float]]:
    """Figures of `EARLY`, as far as the steps go, and of all steps."""
    found = {}
    at = list(accumulate(step.milliseconds / 1000 for step in steps))
    for begin, end in EARLY:
        if part := [step for step, when in zip(steps, at, strict=True) if begin <= when < end]:
            found[f"{begin} to {end} s"] = summary(part)
    return found | {"all": summary(steps)}


def measured_windows(results: Results, row: Row, kind: Kind) -> tuple[EngineFacts, list[Window]]:
    """Raises: ValueError where the row was not measured."""
    runs = [run for run in results.runs if run.kind == kind]
    facts = next((run.facts for run in runs if run.facts is not None), None)
    windows = [window for run in runs for load in results.loads_of(run, row) for window in load.windows]
    if facts is None or not windows:
        raise ValueError(f"row: {row.name} was not measured on {kind}")
    return facts, windows


def long_run(results: Results, row: Row, kind: Kind, outputs: float) -> dict[str, Any]:
    """Raises: ValueError where the results hold no measurement to go on from."""
    if results.device.limits is None:
        raise ValueError("device: only a GPU's floors are known, and these results are of a CPU")
    facts, windows = measured_windows(results, row, kind)
    step_time = StepTime(facts, results.device.limits).fitted(windows)
    steps = simulate(row, kind, step_time, round(outputs * row.output))
    return {
        "row": row.name,
        "kind": kind,
        "outputs": outputs,
        "above_floor": round(step_time.above_floor, 3),
        "measured": {
            "windows": len(windows),
            "tokens_per_second": round(median(window.tokens_per_second for window in windows), 1),
            "running": round(median(window.running for window in windows), 1),
        },
        "calculated": stretches(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="of `rkv-vllm bench`; of the same engines")
    parser.add_argument("--row", action="append", required=True, help="of the results; may be repeated")
    parser.add_argument("--stock-outputs", type=float, default=4, help="lengths of an output (%(default)s)")
    parser.add_argument("--rkv-outputs", type=float, default=1, help="likewise; takes longer (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    try:
        found = go_on(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.json:
        command = command_line("python", "benchmarks/long_run.py")
        arguments.json.write_text(json.dumps({"command": command, "loads": found}, indent=1) + "\n")


def go_on(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints each load's figures, and returns them."""
    results = merge([read_results(path) for path in arguments.results])
    found = []
    table = Table("row", "engine", "measured", "running", "stretch", "calculated", "running", "preempted")
    for name in arguments.row:
        for kind, outputs in (("stock", arguments.stock_outputs), ("rkv", arguments.rkv_outputs)):
            if outputs == 0:
                continue
            one = long_run(results, results.row(name), kind, outputs)
            found.append(one)
            measured = one["measured"]
            for stretch, figures in one["calculated"].items():
                table.add_row(
                    name,
                    kind,
                    f"{measured['tokens_per_second']:,.0f}",
                    f"{measured['running']:.1f}",
                    stretch,
                    f"{figures['tokens_per_second']:,.0f}",
                    f"{figures['running']:.1f}",
                    f"{figures['preemptions']:,}",
                )
    Console(width=120).print(table)
    return found


if __name__ == "__main__":
    main()
