"""`rkv-vllm serve` as its own process on the CPU, with a small model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

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
