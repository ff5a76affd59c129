"""One engine from start to end, in a process of its own: `python -m rkv_vllm.bench.engine_run RESULT`.

It imports all it needs, which takes a while, and waits for a line of JSON (`RunSpec`) on standard input.
RESULT gets JSON lines as they come, so that what was measured is there should the engine or its process die:
first the engine's facts, then a line a load. Progress goes to standard error.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from rkv_vllm.bench.engine import BenchEngine, RefusedError
from rkv_vllm.bench.kernel_time import read_trace
from rkv_vllm.bench.load import Load, LoadRequest, requests_that_run
from rkv_vllm.bench.results import LoadResult, Measure
from rkv_vllm.bench.rows import Kind, Row
from rkv_vllm.bench.window import Step, Window, curve, is_steady, summarise
from rkv_vllm.host.start_failure import awaiting_failure

#: Steps without a first token after which what still waits is taken not to fit into the pool.
STALLED_STEPS = 64
#: Requests and their output tokens that a batch is preceded by.
WARMUP_BATCH = (8, 32)


class RunSpec(BaseModel):
    """What the process is to do; `deadline`: seconds since 1970, after which no window begins."""

    kind: Kind
    arguments: list[str]
    model: str | None
    memory_gib: float | None
    rows: list[Row]
    measure: Measure
    deadline: float | None
    trace_folder: str | None


class OutOfTimeError(Exception):
    """The deadline has passed."""


class LoadRun:
    """One row on the engine."""

    def __init__(self, engine: BenchEngine, row: Row, measure: Measure, deadline: float | None) -> None:
        self._engine, self._row, self._measure, self._deadline = engine, row, measure, deadline
        self._steps: list[Step] = []
        self._in_window = False
        self._begun = time.monotonic()
        self.result = LoadResult(row=row.name, entry=None)

    def run(self, trace_folder: str | None, *, stays: bool) -> None:
        """Fills in `result`, also where it ends early; `stays`: the requests are left to the next row."""
        try:
            self._prepare()
            if self._row.batch is not None:
                self._run_batches(self._row.batch)
            else:
                self._run_steady(trace_folder)
        except (RefusedError, OutOfTimeError, ValueError) as error:
            self.result.failure = str(error)
        self.result.curve = curve(self._begun, self._steps)
        if not stays:
            self.result.pool_whole = self._engine.abort()

    def _prepare(self) -> None:
        self._check_time()
        facts, row = self._engine.facts, self._row
        if row.length > facts.max_model_len:
            raise ValueError(f"{row.length} tokens exceed max_model_len ({facts.max_model_len})")
        budget = row.budget_for(self._engine.kind)
        fit = requests_that_run(row, budget, facts.pool_pages, facts.page_size, facts.max_num_seqs)
        if row.goes_on and row.concurrency is not None:
            self._engine.leave(row.concurrency)
        self._load = Load(row, self._engine.kind, fit, self._engine.unfinished)

    def _run_steady(self, trace_folder: str | None) -> None:
        result, row = self.result, self._row
        result.entry, result.first_requests = self._load.entry, self._load.aged
        result.backlog = len(self._load.first) - self._load.aged
        for request in self._load.first:
            self._engine.add(row, request)
        self._fill({request.index for request in self._load.first[: self._load.aged]})
        filled = self._now()
        result.fill_seconds = filled - self._begun
        result.fill_prompt_tokens = sum(step.prompt_tokens for step in self._steps)
        for _ in range(row.warmup_tokens):
            self._step()
        result.steady = self._settle()
        result.settle_seconds = self._now() - filled
        for _ in range(self._measure.windows):
            result.windows.append(self._window())
        if trace_folder is not None:
            self._profile(Path(trace_folder))

    def _fill(self, expected: set[int]) -> None:
        """Until the first requests run, or as many of them as fit."""
        idle = 0
        while expected and idle < STALLED_STEPS:
            _, news = self._step()
            expected.difference_update(request.index for request, _ in news)
            idle = 0 if news else idle + 1

    def _settle(self) -> bool:
        """Until the load is steady, or has had its time. Returns whether it is."""
        filled, since = len(self._steps), self._now()
        while not is_steady([step.running for step in self._steps[filled:]], self._measure.settle_steps):
            if self._now() - since > self._measure.settle_seconds:
                return False
            self._step()
        return True

    def _window(self) -> Window:
        begun, client, first = self._now(), time.process_time(), len(self._steps)
        self._in_window = True
        wanted = self._measure.window_steps
        while (
            self._now() - begun < self._measure.window_seconds
            if wanted is None
            else len(self._steps) - first < wanted
        ):
            self._step()
        return self._summarise(begun, first, client)

    def _run_batches(self, count: int) -> None:
        self._run_batch(self._load.batch(min(count, WARMUP_BATCH[0]), WARMUP_BATCH[1]))
        self.result.first_requests = count
        for _ in range(self._measure.windows):
            first, client, begun = len(self._steps), time.process_time(), time.monotonic()
            self._in_window = True
            self._run_batch(self._load.batch(count))
            self.result.windows.append(self._summarise(begun, first, client))

    def _run_batch(self, requests: list[LoadRequest]) -> None:
        for request in requests:
            self._engine.add(self._row, request)
        while self._engine.unfinished:
            self._step(replace=False)

    def _profile(self, folder: Path) -> None:
        before = set(folder.iterdir())
        self._engine.profile(True, f"{self._engine.kind}-{len(before)}")
        first = len(self._steps)
        while len(self._steps) - first < self._measure.profile_steps:
            self._step()
        self._engine.profile(False)
        for trace in set(folder.iterdir()) - before:
            if ".trace.json" in trace.name:
                self.result.kernel_time = read_trace(trace, self._measure.profile_steps)

    def _step(self, replace: bool = True) -> tuple[Step, list[tuple[LoadRequest, bool]]]:
        """One step; a new request for each that ended. Its times stay until its window is summed up."""
        self._check_time()
        step, news = self._engine.step()
        if not self._in_window:
            step.forget_times()
        self._steps.append(step)
        for _, finished in news:
            if finished and replace:
                self._engine.add(self._row, self._load.next())
        return step, news

    def _check_time(self) -> None:
        if self._deadline is not None and time.time() > self._deadline:
            raise OutOfTimeError("the time limit came first")

    def _now(self) -> float:
        """Time of the last step, on the engine's clock: Linux has one monotonic clock for all processes."""
        return self._steps[-1].at if self._steps else self._begun

    def _summarise(self, begun: float, first: int, client: float) -> Window:
        steps, pool_pages = self._steps[first:], self._engine.facts.pool_pages
        window = summarise(begun, steps, pool_pages, time.process_time() - client)
        self._in_window = False
        for step in steps:
            step.forget_times()
        return window


class NoStartError(Exception):
    """The engine did not start; the message says why."""


def _start(spec: RunSpec) -> BenchEngine:
    with awaiting_failure() as failure:
        try:
            return BenchEngine(
                spec.kind,
                spec.arguments,
                model=spec.model,
                memory_gib=spec.memory_gib,
                longest=max(row.length for row in spec.rows),
                trace_folder=spec.trace_folder,
            )
        except RuntimeError as error:
            if (reason := failure.reason(error)) is None:
                raise
            raise NoStartError(" ".join(reason.split())) from None


def run_engine(spec: RunSpec, say: Callable[[str], None], write: Callable[[BaseModel], None]) -> None:
    """Starts the engine and runs all rows that the deadline allows."""
    engine = _start(spec)
    try:
        write(engine.facts)
        gc.collect()
        gc.freeze()
        for row, following in zip(spec.rows, [*spec.rows[1:], None], strict=True):
            say(f"{spec.kind}: {row.name}")
            run = LoadRun(engine, row, spec.measure, spec.deadline)
            # A profiler that was used once may slow down what follows.
            stays = following is not None and following.goes_on
            run.run(spec.trace_folder if following is None else None, stays=stays)
            write(run.result)
            say(f"{spec.kind}: {row.name}: {_in_short(run.result)}")
    finally:
        engine.close()


def _in_short(result: LoadResult) -> str:
    speeds = ", ".join(f"{window.tokens_per_second:,.0f}" for window in result.windows)
    times = f"filled in {result.fill_seconds:.0f} s, settled in {result.settle_seconds:.0f} s"
    return "; ".join(filter(None, (f"{speeds} tokens/s" if speeds else "", times, result.failure)))


def main() -> None:
    line = sys.stdin.readline()
    if not line:
        return  # nobody is there any more
    spec = RunSpec.model_validate_json(line)

    def say(text: str) -> None:
        print(f"[bench] {text}", file=sys.stderr, flush=True)

    with Path(sys.argv[1]).open("w") as file:

        def write(line: BaseModel) -> None:
            file.write(line.model_dump_json() + "\n")
            file.flush()

        run_engine(spec, say, write)


if __name__ == "__main__":
    main()
