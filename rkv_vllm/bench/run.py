"""Runs a group: engine after engine, each in a process of its own, and collects what they measured."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread, Timer

from rkv_vllm.bench.engine_run import RunSpec
from rkv_vllm.bench.results import Device, EngineFacts, EngineRun, LoadResult, Measure, Results
from rkv_vllm.bench.rows import Group, Kind
from rkv_vllm.provenance import command_line, versions

#: Of every process: the engine core apart from what measures it, and nothing asked of or told to the network.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
#: Seconds that a process has after its deadline to end by itself.
GRACE_SECONDS = 30.0
PROGRESS = "[bench] "
#: Loads that take about as long as the start of an engine.
START_IN_LOADS = 2

Say = Callable[[str], None]


def run_group(
    group: Group,
    measure: Measure,
    *,
    extra: list[str],
    rounds: int,
    time_limit: float | None,
    log: Path,
    say: Say,
    save: Callable[[Results], None],
) -> Results:
    """Starts one engine after another and has each run the group's rows.

    Raises: ValueError where something asked for needs a GPU and there is none.

    Args:
        extra: options of `vllm serve` for every engine, behind the group's own.
        rounds: how often the group's kinds of engine take turns.
        time_limit: seconds for everything; runs that are still to come share what is left by their loads.
        log: file for what the engines print.
        say: told of progress.
        save: given the results so far, after each load.
    """
    deadline = None if time_limit is None else time.time() + time_limit
    kinds = [kind for kind in group.lives if group.rows_for(kind)] * rounds
    log.write_bytes(b"")
    with tempfile.TemporaryDirectory(prefix="rkv-bench-") as name, ExitStack() as stack:
        folder = Path(name)

        def prepare(place: int) -> EngineProcess:
            process = EngineProcess(_python("rkv_vllm.bench.engine_run"), folder / f"{place}.jsonl", log)
            stack.callback(process.end)
            return process

        waiting = [prepare(0)]
        say("measuring the device")
        results = Results(
            command=command_line(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            platform=platform.platform(),
            device=_device(log),
            group=group,
            measure=measure,
        )
        if results.device.limits is None and (measure.profile_steps or group.memory_gib is not None):
            raise ValueError("--profile and memory_gib are for GPUs; for a CPU give --kv-cache-memory-bytes")
        for place, kind in enumerate(kinds):
            say(f"engine {place + 1} of {len(kinds)}: {kind}")
            run = EngineRun(kind=kind, arguments=[*group.arguments(kind), *extra])
            results.runs.append(run)
            ends = None if deadline is None else _share(group, kinds[place:], time.time(), deadline)
            process = waiting.pop()
            if place + 1 < len(kinds):  # it imports what it needs while this one starts its engine
                waiting.append(prepare(place + 1))
            _run_engine(process, results, run, ends, folder / f"traces-{place}", say, save)
            save(results)
    return results


def _share(group: Group, kinds: Sequence[Kind], now: float, deadline: float) -> float:
    """When the first of the runs that are still to come has to end: they share the time by their loads."""
    weights = [START_IN_LOADS + len(group.rows_for(kind)) for kind in kinds]
    return now + (deadline - now) * weights[0] / sum(weights)


def _run_engine(
    process: EngineProcess,
    results: Results,
    run: EngineRun,
    deadline: float | None,
    traces: Path,
    say: Say,
    save: Callable[[Results], None],
) -> None:
    """Runs an engine and fills it in as its loads are measured."""
    group, measure = results.group, results.measure
    traces.mkdir()
    spec = RunSpec(
        kind=run.kind,
        arguments=run.arguments,
        model=group.model,
        memory_gib=group.memory_gib,
        rows=group.rows_for(run.kind),
        measure=measure,
        deadline=deadline,
        trace_folder=str(traces) if measure.profile_steps else None,
    )

    def progress(text: str) -> None:
        say(text)
        _read(process.results, run)
        save(results)

    run.failure = process.run(spec.model_dump_json(), deadline, progress)
    _read(process.results, run)
    if run.failure:
        say(f"{run.kind}: {run.failure}")


def _read(file: Path, run: EngineRun) -> None:
    """Takes over what the engine's process has written so far, in whole lines."""
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if lines:
        run.facts = EngineFacts.model_validate_json(lines[0])
        run.loads = [LoadResult.model_validate_json(line) for line in lines[1:]]


class EngineProcess:
    """A process that is to run one engine, and waits for its spec."""

    def __init__(self, command: Sequence[str], results: Path, log: Path) -> None:
        """Starts it.

        Args:
            results: its last argument, the file that it writes to.
            log: gets all that it prints.
        """
        self.results, self._log = results, log
        results.touch()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, str(results)],
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that all its processes can be stopped together
            )
        # What it leaves behind would keep its output open.
        Thread(target=self._clear_up, daemon=True).start()

    def run(self, spec: str, deadline: float | None, say: Say) -> str | None:
        """Gives it its spec and watches it to its end. Returns what went wrong, if anything did.

        Args:
            spec: one line.
            deadline: seconds since 1970, some time after which it is stopped.
            say: told of progress.
        """
        assert self._process.stdin is not None and self._process.stderr is not None
        last: deque[str] = deque(maxlen=200)
        with self._log.open("ab") as output:
            killer = self._kill_at(deadline)
            killer.start()
            try:
                with suppress(BrokenPipeError):  # it has ended already, and says why
                    self._process.stdin.write(spec + "\n")
                    self._process.stdin.close()
                for line in self._process.stderr:
                    if line.startswith(PROGRESS):
                        say(line.removeprefix(PROGRESS).rstrip())
                    last.append(line.rstrip())
                    output.write(line.encode())
                    output.flush()
                code = self._process.wait()
            finally:
                killer.cancel()
                self.end()
        if code == 0:
            return None
        if deadline is not None and time.time() > deadline + GRACE_SECONDS - 1:
            return "the time limit came first"
        return f"the engine's process ended with status {code}: {_cause(list(last))}"

    def end(self) -> None:
        """Ends it, if it runs still."""
        if self._process.poll() is None:
            self._kill_group()
        self._process.wait()

    def _kill_at(self, deadline: float | None) -> Timer:
        """Kills the process some time after its deadline, unless cancelled."""
        seconds = (
            threading.TIMEOUT_MAX if deadline is None else max(deadline + GRACE_SECONDS - time.time(), 0)
        )
        killer = Timer(seconds, self.end)
        killer.daemon = True
        return killer

    def _clear_up(self) -> None:
        """Ends what it left behind, and no later: the engine core outlives it where it was killed."""
        self._process.wait()
        self._kill_group()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _cause(lines: list[str]) -> str:
    """The line that says most of what went wrong: the last one with an error of its own in it."""
    errors = [line.strip() for line in lines if "Error" in line and not line.startswith(" ")]
    telling = [line for line in errors if "Engine core initialization failed" not in line]
    found = telling or errors or [line for line in lines if line.strip()] or ["it printed nothing"]
    return found[-1][:500]


def _device(log: Path) -> Device:
    """The device and its limits, measured apart: no process that starts an engine may hold memory of it."""
    with log.open("ab") as output:
        done = subprocess.run(
            _python("rkv_vllm.bench.hardware_limits"),
            env={**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR"},
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            check=True,
        )
    return Device.model_validate(json.loads(done.stdout.splitlines()[-1]))


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]
