"""What `rkv-vllm doctor` says of a configuration, and what becomes of it under `rkv-vllm serve`.

Both run in processes that have imported vLLM already. Refused configurations never get as far as an engine.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import eventually
from support.tiny_configs import make_config

from rkv_vllm.demo.server import free_port
from rkv_vllm.host.pool import too_small_remedy
from rkv_vllm.host.start_failure import TOO_SMALL
from rkv_vllm.settings.config import RkvConfig

pytestmark = pytest.mark.engine

STARTS, REFUSED, USAGE = 0, 1, 2
PAGES = ("--block-size=32", "--max-model-len=4096")
BUDGET = ("--kv-budget=256",)
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3}'
CONNECTOR = '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'


@dataclass(frozen=True)
class Case:
    """A configuration; `fate`: how `doctor` and `serve` end; `reason`: what both have to say."""

    kind: str
    options: tuple[str, ...] = ()
    fate: int = STARTS
    reason: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join((self.kind, *self.options))


CASES = (
    Case("llama"),
    Case("qwen3"),
    Case("qwen2-window-unused"),
    Case("mistral-0.3"),
    Case("falcon"),
    Case("mistral-0.1", ("--disable-sliding-window",)),
    Case("gemma3", ("--disable-sliding-window",)),
    Case("mistral-0.1", fate=REFUSED, reason="sliding-window attention"),
    Case("mistral-0.1", fate=REFUSED, reason="--disable-sliding-window"),
    Case("gemma2"),
    Case("gemma3"),
    Case(
        "gemma3", ("--disable-hybrid-kv-cache-manager",), REFUSED, "leave out --disable-hybrid-kv-cache-mana"
    ),
    Case("cohere2"),
    Case("gpt-oss"),
    Case("gemma3n"),
    Case("gemma4"),
    Case("llama4"),
    Case("bloom", fate=REFUSED, reason="ALiBi"),
    Case("falcon-alibi", fate=REFUSED, reason="ALiBi"),
    Case("deepseek2", fate=REFUSED, reason="multi-head latent attention"),
    Case("nemotron-h", fate=REFUSED, reason="state-space"),
    Case("bert", fate=REFUSED, reason="pooling models"),
    Case("llama", ("--kv-cache-dtype=int8_per_token_head",), REFUSED, "--kv-cache-dtype fp8 works"),
    Case("llama", ("--kv-cache-dtype-skip-layers=0",), REFUSED, "leave out --kv-cache-dtype-skip-layers"),
    Case("llama", (f"--speculative-config={NGRAM}",)),
    Case("llama", (f"--kv-transfer-config={CONNECTOR}",), REFUSED, "leave out --kv-transfer-config"),
    Case("llama", ("--block-size=16",), REFUSED, "CPU_ATTN takes multiples of 32"),
    # A request of 4,096 tokens takes 128 pages, and vLLM keeps one for itself.
    Case("llama", (*PAGES, "--num-gpu-blocks-override=129")),
    Case("llama", (*PAGES, "--num-gpu-blocks-override=128"), REFUSED, "--kv-beyond-pool"),
    Case("llama", (*PAGES, "--num-gpu-blocks-override=128"), REFUSED, "--max-model-len of at most 4064"),
    Case("llama", (*PAGES, "--num-gpu-blocks-override=128"), REFUSED, "--num-gpu-blocks-override"),
    Case("llama", (*PAGES, "--num-gpu-blocks-override=64", "--kv-beyond-pool")),
    Case("llama", (*PAGES, "--num-gpu-blocks-override=12", "--kv-beyond-pool"), REFUSED, "--kv-buffer"),
    Case("llama", ("--block-size=32", "--max-model-len=auto", "--num-gpu-blocks-override=64")),
    # 2 layers with 2 KV heads of 32, K and V in 2 bytes: 512 bytes a token.
    Case("llama", (*PAGES, f"--kv-cache-memory-bytes={129 * 32 * 512}")),
    Case("llama", (*PAGES, f"--kv-cache-memory-bytes={129 * 32 * 512 - 1}"), REFUSED, "--kv-cache-memory-b"),
    Case("llama", ("--max-model-len=9000",), USAGE, "max_model_len"),
    Case("llama", ("--kv-budget=5",), USAGE, "--kv-budget"),
    Case("llama", ("--enable-auto-tool-choice",), USAGE, "--tool-call-parser"),
)
#: For a quick start that takes little of the machine.
SMALL = ("--enforce-eager", "--distributed-executor-backend=uni", "--kv-cache-memory-bytes=64M")
#: Those whose servers are really started, and answer.
STARTED = (
    Case("qwen2-window-unused"),
    Case("gemma3", ("--disable-sliding-window",)),
    Case("llama", (*PAGES, "--num-gpu-blocks-override=129")),
    Case("llama", (*PAGES, "--num-gpu-blocks-override=64", "--kv-beyond-pool")),
)


def _command(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """In a process of its own: `rkv-vllm` with these words, all that it prints into a file."""
    os.environ.clear()
    os.environ.update(environment)  # whoever started the server of forks first had another one
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv = ["rkv-vllm", *words]
    from vllm.model_executor.models import registry

    # It imports a model's module in a process of its own, in ten seconds.
    registry._run_in_subprocess = lambda inspect: inspect()
    from rkv_vllm.cli import app

    app()


class Command:
    """`rkv-vllm` with some words, in a process."""

    def __init__(self, words: list[str], log: Path) -> None:
        self._log = log
        processes = get_context("forkserver")
        processes.set_forkserver_preload(["vllm.entrypoints.cli.serve", "vllm.v1.worker.cpu_worker"])
        self.process = processes.Process(target=_command, args=(words, log, dict(os.environ)))
        self.process.start()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def ends(self, seconds: float = 120) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # allows the executor `uni`
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # the engine core need not import anything
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    yield


def words(case: Case, folder: Path) -> list[str]:
    model = str(make_config(folder, case.kind, case.changes))
    return [model, "--load-format=dummy", "--skip-tokenizer-init", *BUDGET, *case.options]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_doctor_knows_what_becomes_of_a_server(case: Case, tmp_path: Path) -> None:
    """Proves that `doctor` and `serve` come to the same end for the same reason, and that it is the last that
    `serve` prints, before an engine is started."""
    doctor = Command(["doctor", *words(case, tmp_path)], tmp_path / "doctor")
    assert doctor.ends() == case.fate, doctor.output
    assert case.reason in doctor.output
    if case.fate == STARTS:
        return
    serve = Command(["serve", *words(case, tmp_path)], tmp_path / "serve")
    assert serve.ends() == case.fate, serve.output
    assert case.reason in serve.output.rpartition("\n\n")[2]
    assert "EngineCore" not in serve.output and "Traceback" not in serve.output


@pytest.mark.parametrize("case", STARTED, ids=str)
def test_a_server_starts_where_the_doctor_says_so(case: Case, tmp_path: Path) -> None:
    """Proves it with servers that answer a request of token ids."""
    assert any((each.kind, each.options, each.fate) == (case.kind, case.options, STARTS) for each in CASES)
    port = free_port()
    command = [*words(case, tmp_path), *SMALL, f"--port={port}", "--served-model-name=m"]
    serve = Command(["serve", *command], tmp_path / "serve")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:

        def ready() -> bool:
            try:
                return not serve.process.is_alive() or http.get("/health").is_success
            except httpx.TransportError:
                return False

        assert eventually(ready, 180) and serve.process.is_alive(), serve.output
        asked = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 3, "detokenize": False}
        assert http.post("/v1/completions", json=asked).json()["usage"]["completion_tokens"] == 3
    os.kill(serve.process.pid or 0, signal.SIGTERM)
    assert serve.ends() == 0, serve.output


def test_what_an_engine_finds_wrong_is_printed_last(tmp_path: Path) -> None:
    """Proves that the reason comes out of a worker's process, where only that can know it: here that the
    machine has not so much memory."""
    options = ("--kv-cache-memory-bytes=900G", "--enforce-eager", "--distributed-executor-backend=mp")
    serve = Command(["serve", *words(Case("llama"), tmp_path), *options], tmp_path / "serve")
    assert serve.ends(180) == 1, serve.output
    assert "Decrease --kv-cache-memory-bytes" in serve.output.rpartition("\n\n")[2]
    assert "EngineCore" in serve.output


def test_vllms_own_words_about_a_pool_are_recognised() -> None:
    """Proves that the advice which names our option follows vLLM's, where it measured the memory itself."""
    try:
        from vllm.v1.core.kv_cache_planning import _check_enough_kv_cache_memory
    except ImportError:  # before 0.33
        from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    for memory in (0, 1):
        with pytest.raises(ValueError) as refused:
            _check_enough_kv_cache_memory(memory, lambda: 2, 4096, lambda _: 100)
        assert str(refused.value).startswith(TOO_SMALL)
    assert "--kv-beyond-pool with a default --kv-budget" in too_small_remedy(RkvConfig())
    assert "--kv-beyond-pool, which" in too_small_remedy(RkvConfig(budget=256))
    assert "smaller --kv-budget" in too_small_remedy(RkvConfig(budget=256, beyond_pool=True))
