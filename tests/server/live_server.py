"""`rkv-vllm serve` as its own process on the CPU, with a small model."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import AsyncOpenAI

#: Name clients use.
MODEL = "smollm2"
PAGE_SIZE = 32
OPTIONS = (
    *("--dtype", "float32"),  # runs on every CPU
    *("--block-size", str(PAGE_SIZE)),
    *("--max-model-len", "1024"),
    *("--max-num-batched-tokens", "512"),
    *("--kv-cache-memory-bytes", "256M"),
    *("--distributed-executor-backend", "uni"),  # one process less
    "--enforce-eager",  # no compiler needed, and a quick start
)

#: Given further options of `rkv-vllm serve`, starts a server, gives its URL, and stops it on the way out.
StartServer = Callable[..., AbstractContextManager[str]]


@dataclass(frozen=True)
class Server:
    """A running server with API keys; `keys` has them by name, alice's among them."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    keys: Mapping[str, str]

    def http(self, key: str | None = "alice") -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[key]}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def openai(self, key: str = "alice") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.keys[key], timeout=300, max_retries=0)

    def metric(self, name: str) -> float:
        with self.http() as http:
            text = http.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))

    def idle(self) -> bool:
        """Whether no request runs or waits and every page is in the pool. vLLM renews these numbers when it
        runs a step, which a last short request makes it do."""
        with self.http() as http:
            http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1})
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        return not any(self.metric(name) for name in names)

    def access_lines_of(self, request_id: str, count: int) -> list[dict[str, Any]]:
        """The `count` lines of the requests with this id. A line is written after the client has its whole
        answer, so that it may still be on its way."""

        def lines() -> list[dict[str, Any]]:
            return [line for line in access_lines(self.log) if line["request_id"] == request_id]

        assert eventually(lambda: len(lines()) >= count, 10), f"no {count} lines of {request_id}"
        return lines()

    def memory(self) -> int:
        """Resident bytes of all processes of the server."""
        first = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in (first, *first.children(recursive=True)))


def access_lines(log: Path) -> list[dict[str, Any]]:
    """The complete lines of the access log in a server's log."""
    complete = log.read_text(errors="replace").rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in complete if line.startswith('{"time"')]


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met
