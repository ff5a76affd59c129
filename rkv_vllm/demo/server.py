"""A server process for the demo: started on a free loopback port, awaited, and stopped cleanly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 600
STOP_SECONDS = 60
#: The demo's server: everything comes from the model directory, nothing is asked of or told to the network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # allows the executor `uni`
    "VLLM_NO_USAGE_STATS": "1",
    # The weights are read whole for every token: large pages save the look-ups of 130,000 small ones.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1073741824",
    "THP_MEM_ALLOC_ENABLE": "1",
}
MOST_THREADS = 8


class ServerError(Exception):
    """The server did not start, or did not stop cleanly; the message ends with the tail of its log."""


@contextmanager
def serving(
    model: Path, name: str, options: list[str], log: Path, waiting: Callable[[float], None]
) -> Iterator[str]:
    """Serve `model` with `rkv-vllm serve` and yield the server's URL; stop it on the way out.

    Args:
        model: directory of a Hugging Face model.
        name: the name clients use.
        options: further options of `rkv-vllm serve`.
        log: file for the server's output.
        waiting: called about four times a second with the seconds since the start, until the server is ready.

    Raises: ServerError.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "rkv_vllm.cli", "serve", str(model), "--served-model-name", name),
        *("--host", "127.0.0.1", "--port", str(port), *options),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**threads(), **os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only us, and we stop the whole group
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log, waiting)
        yield url
    except BaseException:
        stop(process)
        raise
    if (code := stop(process)) != 0:
        raise ServerError(f"the server ended with status {code}\n{tail(log)}")


def threads() -> dict[str, str]:
    """Threads for the model, unless the caller's environment says otherwise.

    Waiting for each other they spin for some microseconds and then sleep: on few cores, one that spins for
    ever keeps the very thread that it waits for off its core, and one that sleeps at once wakes up late.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(min(cores, MOST_THREADS)), "GOMP_SPINCOUNT": "30000"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(
    process: subprocess.Popen[bytes], url: str, log: Path, waiting: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while (waited := time.monotonic() - started) < START_SECONDS:
        if process.poll() is not None:
            raise ServerError(f"the server ended with status {process.returncode} at start\n{tail(log)}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        waiting(waited)
        time.sleep(0.25)
    raise ServerError(f"the server was not ready after {START_SECONDS} s\n{tail(log)}")


def stop(process: subprocess.Popen[bytes]) -> int:
    """Ask the server to end and return its exit status; what has not ended in time is killed."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the group outlives its leader while any member runs
        except ProcessLookupError:
            process.wait()


def tail(log: Path, lines: int = 25) -> str:
    last = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"(the end of {log})", *last])
