"""A server that never had a request: what it says of its pool, and how it stops."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
from live_server import MODEL, PAGE_SIZE

from rkv_vllm.demo.model import prepare
from rkv_vllm.demo.server import serving

PAGES = 40
#: Two API servers, an engine and its worker, each a process of its own.
OPTIONS = [
    *("--dtype", "float32", "--enforce-eager", "--api-server-count", "2"),
    *("--block-size", str(PAGE_SIZE), "--num-gpu-blocks-override", str(PAGES)),
    *("--kv-cache-memory-bytes", "256M", "--max-num-batched-tokens", "512"),
    *("--max-model-len", "4096", "--kv-beyond-pool", "--kv-budget", "256", "--kv-buffer", "64"),
    *("--shutdown-timeout", "60"),
]


def test_an_idle_server_knows_its_pool_and_stops_at_once(tmp_path: Path) -> None:
    """Before any request, and with max_model_len beyond the pool, log and metrics say what the pool holds;
    with a client's connection still open, the stop waits neither for that nor for a timeout."""
    log = tmp_path / "log"
    with (
        httpx.Client() as client,
        serving(prepare(), MODEL, OPTIONS, log, lambda _: None) as url,
    ):
        metrics = client.get(f"{url}/metrics").text
        assert client.get(f"{url}/v1/models").status_code == 200
        stopping = time.monotonic()
    stopped = time.monotonic()

    assert re.findall(r"^rkv_pool_pages{.*} (\S+)$", metrics, re.MULTILINE) == [f"{PAGES - 1}.0"]
    [said] = re.findall(r'^vllm:cache_config_info{.*kv_cache_size_tokens="(\d+)"', metrics, re.MULTILINE)
    assert int(said) == PAGES * PAGE_SIZE
    assert f"KV cache size: {PAGES * PAGE_SIZE:,} tokens" in log.read_text()
    print(f"stopped in {stopped - stopping:.1f} s")
    assert stopped - stopping < 30
