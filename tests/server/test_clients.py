"""What other projects' clients keep of the proof that a request was compacted, and what each needs for it.

Their programs in `clients/` run in an environment of their own, which `scripts/install_clients.py` prepares.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from live_server import MODEL, OPTIONS, access_lines, eventually

from rkv_vllm.demo.model import prepare
from rkv_vllm.demo.server import serving

pytestmark = [pytest.mark.engine, pytest.mark.clients]

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "clients"
#: Nothing is asked of or told to the network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
#: The report's members that are the same for every client.
EXPECTED = {"budget": 32, "buffer": 16, "policy": "invariant", "page_size": 32}


@dataclass(frozen=True)
class Clients:
    python: Path
    url: str
    log: Path

    def run(self, program: str) -> dict[str, Any]:
        """What a program of `clients/` prints."""
        text = self._run(str(PROGRAMS / program), self.url, MODEL)
        found: dict[str, Any] = json.loads(text.splitlines()[-1])
        return found

    def guidellm(self, *words: str) -> None:
        self._run("-m", "guidellm", "run", *words)

    def _run(self, *words: str) -> str:
        environment = {**os.environ, **ENVIRONMENT}
        done = subprocess.run([self.python, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def line_of(self, request_id: str) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [line for line in access_lines(self.log) if line["request_id"] == request_id]

        assert eventually(lambda: bool(found()), 10)
        return found()[0]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    install = [sys.executable, str(ROOT / "scripts" / "install_clients.py")]
    python = Path(subprocess.run(install, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    log = tmp_path_factory.mktemp("clients") / "log"
    with serving(prepare(), MODEL, [*OPTIONS, "--access-log", "json"], log, waiting=lambda _: None) as url:
        yield Clients(python, url, log)


def check_report(report: dict[str, Any]) -> None:
    assert {key: report[key] for key in EXPECTED} == EXPECTED
    assert report["compactions"] > 0
    assert report["evicted_tokens"] > 0


def check_headers(headers: dict[str, str], prefix: str = "") -> None:
    assert headers[f"{prefix}x-rkv-budget"] == "32"
    assert int(headers[f"{prefix}x-rkv-compactions"]) > 0


def test_litellm(clients: Clients) -> None:
    """Proves that it keeps the object whole, and that of a stream in the details of usage; headers too."""
    found = clients.run("litellm_client.py")
    for name in ("answer", "last chunk", "stream put together", "response"):
        check_report(found[name])
    check_headers(found["headers"])
    check_headers(found["additional headers"], "llm_provider-")


def test_langchain(clients: Clients) -> None:
    """Proves that it keeps an answer's details of usage and, asked to, headers; of a stream it keeps the
    request's id alone, which names its line in the access log."""
    found = clients.run("langchain_client.py")
    check_report(found["answer"])
    check_headers(found["headers"])
    check_headers(found["headers of a response"])
    streamed = found["headers of a stream"]
    assert "x-rkv-budget" not in streamed
    check_report(clients.line_of(streamed["x-request-id"])["kv_cache"])


def test_openai_agents(clients: Clients) -> None:
    """Proves that it keeps the details of usage: of responses always, of chats with `preserve_raw_usage`."""
    for report in clients.run("agents_client.py").values():
        check_report(report)


def test_guidellm(clients: Clients, tmp_path: Path) -> None:
    """Proves that it sends the settings with every request; it keeps nothing, and the access log has all."""
    before = len(access_lines(clients.log))
    backend = {
        "kind": "openai_http",
        "target": clients.url,
        "model": MODEL,
        "request_format": "/v1/completions",
        "extras": {"body": {"kv_cache": {"budget": 32, "buffer": 16}}},
    }
    data = {"kind": "synthetic_text", "prompt_tokens": 40, "output_tokens": 24}
    clients.guidellm(
        *("--backend", json.dumps(backend)),
        *("--profile", "kind=synchronous"),
        *("--constraint", "kind=max_requests,count=2"),
        *("--tokenizer", f"kind=huggingface_auto,model={prepare()}"),
        *("--data", json.dumps(data)),
        *("--output", f"kind=json,path={tmp_path / 'report.json'}"),
        "--disable-console",
    )

    def reports() -> list[dict[str, Any]]:
        lines = access_lines(clients.log)[before:]
        return [line["kv_cache"] for line in lines if line["path"] == "/v1/completions"]

    assert eventually(lambda: len(reports()) >= 2, 10)
    for report in reports():
        check_report(report)
