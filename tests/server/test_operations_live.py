"""`rkv-vllm serve` as an operator and 64 clients meet it, with a small model on the CPU."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from live_server import MODEL, Server, eventually
from nasty import PATHS, REFUSED, ROUTES, UNFIT
from openai import APIStatusError, AsyncOpenAI

from rkv_vllm.demo.model import prepare
from rkv_vllm.demo.server import ENVIRONMENT, free_port, stop, tail, wait_until_ready
from rkv_vllm.server.routes import OPEN_ROUTES

pytestmark = pytest.mark.engine

KEYS = {"alice": "sk-alice-0123456789abcdef", "bob": "sk-bob-0123456789abcdef"}
MOST_TOKENS = 128
DRAIN_SECONDS = 30
OPTIONS = [
    *("--dtype", "float32"),
    *("--block-size", "32"),
    *("--max-model-len", "512"),
    *("--max-num-seqs", "64"),
    *("--max-num-batched-tokens", "512"),
    *("--kv-cache-memory-bytes", "128M"),  # too little for all clients at once
    "--enforce-eager",
    *("--limit-max-tokens", str(MOST_TOKENS)),
    *("--limit-n", "4"),
    *("--limit-concurrent-per-key", "64"),
    *("--access-log", "json"),
    *("--shutdown-timeout", str(DRAIN_SECONDS)),
]
CLIENTS = 64
BUDGETS = (0, 16, 24, 32)
#: What the processes of the server may grow by while they serve CLIENTS requests more: allocators and tables
#: of Python processes move by some MiB.
GROWTH_BYTES = 48 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tests below use it in their order, and the last one stops it."""
    directory = tmp_path_factory.mktemp("operations")
    keys, log, port = directory / "keys", directory / "log", free_port()
    keys.write_text("# two\n" + "".join(f"{name} {key}\n" for name, key in KEYS.items()))
    command = [
        *(sys.executable, "-m", "rkv_vllm.cli", "serve", str(prepare()), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key-file", str(keys), *OPTIONS),
    ]
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT, **threads},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log, lambda _: None)
        yield Server(url, process, log, KEYS)
    finally:
        stop(process)


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Once upon a time", "ignore_eos": True, **fields}


def test_guards_every_open_route_and_closes_the_others(server: Server) -> None:
    """All routes of vLLM's application, as its schema and its log list them, and some of development."""
    routes = set(re.findall(r"Route: (/\S*),", server.log.read_text()))
    with server.http() as http, server.http(key=None) as stranger:
        routes |= set(http.get("/openapi.json").json()["paths"])
        assert {"/invocations", "/scale_elastic_ep", "/v1/completions", "/metrics"} <= routes
        routes = {route.replace("{response_id}", "resp_{id}") for route in routes}
        for route in routes | {"/sleep", "/collective_rpc", "/v1/load_lora_adapter"} | set(OPEN_ROUTES):
            statuses = {method: stranger.request(method, route).status_code for method in ("GET", "POST")}
            if route in ("/health", "/ready"):
                assert statuses["GET"] == 200
                continue
            assert set(statuses.values()) == {401}, "whether open, closed or nowhere"
            if route not in OPEN_ROUTES:
                assert http.get(route).status_code == http.post(route, json={}).status_code == 404, route
        closed = http.post("/tokenize", json={}).json()["error"]["message"]
        assert (
            closed
            == "/tokenize is closed on this server: --open-routes /tokenize (RKV_OPEN_ROUTES) opens it."
        )
        assert http.get("/tokenise").json()["error"]["message"] == "There is no such route."
        assert stranger.get("/nowhere").status_code == stranger.get("/tokenize/").status_code == 401
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/v1/models").status_code == 200
    log = server.log.read_text()
    assert re.search("these are open: .*/v1/models", log)
    assert re.search("closed until --open-routes names them: .*/tokenize", log)


def test_a_trailing_slash_leads_where_it_leads_in_vllm(server: Server) -> None:
    """With a request's method and body, and with its key: none is needed where none was before."""
    with server.http() as http, server.http(key=None) as stranger:
        answer = http.post("/v1/completions/", json=completion(max_tokens=1))
        assert (answer.status_code, answer.headers["location"]) == (307, "/v1/completions")
        http.follow_redirects = stranger.follow_redirects = True
        assert http.post("/v1/completions/", json=completion(max_tokens=1)).status_code == 200
        assert http.get("/v1/models/").json()["data"][0]["id"] == MODEL
        assert http.get("/metrics/").status_code == stranger.get("/health/").status_code == 200
        assert stranger.get("/metrics/").status_code == stranger.get("/v1/models/").status_code == 401


def test_request_ids_go_through_vllm_and_into_the_log(server: Server) -> None:
    """Also on an error; two running requests may have the same one; the log names the caller, not the key."""

    async def ask(key: str, **fields: Any) -> Any:
        async with server.openai(key) as openai:
            return await openai.completions.create(
                model=MODEL, prompt="a", extra_headers={"X-Request-ID": "mine"}, **fields
            )

    async def ask_three() -> list[Any]:
        return await asyncio.gather(
            ask("alice", max_tokens=8), ask("bob", max_tokens=8), ask("bob", n=5), return_exceptions=True
        )

    first, second, refused = asyncio.run(ask_three())
    assert first.id == second.id == "cmpl-mine"
    assert isinstance(refused, APIStatusError)
    assert refused.response.headers["x-request-id"] == "mine"
    lines = server.access_lines_of("mine", 3)
    assert sorted((line["key"], line["status"]) for line in lines) == [
        ("alice", 200),
        ("bob", 200),
        ("bob", 400),
    ]
    reports = {line["status"]: line["kv_cache"] for line in lines}
    assert (reports[200]["budget"], reports[200]["page_size"], reports[400]) == ("full", 32, None)
    assert not any(key in server.log.read_text() for key in KEYS.values())


def test_limits_hold_and_spare_long_prompts(server: Server) -> None:
    """Above the limit 400 names the field; where nothing is asked for the limit holds, or what the model has
    left; wrong JSON is refused by vLLM as ever."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "ignore_eos": True}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={**chat, "max_completion_tokens": MOST_TOKENS + 1})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_completion_tokens")
        answer = http.post("/v1/chat/completions", json=chat)
        assert answer.json()["usage"]["completion_tokens"] == MOST_TOKENS
        long = [{"role": "user", "content": "one " * 450}]
        usage = http.post("/v1/chat/completions", json={**chat, "messages": long}).json()["usage"]
        assert usage["prompt_tokens"] + MOST_TOKENS > 512
        assert usage["total_tokens"] == 512
        answer = http.post("/v1/completions", content="{", headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_nothing_nasty_fails_in_the_server(server: Server) -> None:
    """Proves that bodies and paths which stock vLLM answers with 500, or takes for another route than we do,
    are refused in a few words, and that the log names no error."""
    before = server.log.stat().st_size
    posts = [(400, route, body) for route in ROUTES for body in UNFIT.values()]
    posts += [(400, route, body) for route in ROUTES[:3] for body in REFUSED.values()]
    posts += [(404, path, json.dumps(completion(max_tokens=1)).encode()) for path in PATHS]
    headers = {"content-type": "application/json", "x-request-id": "nasty"}
    with server.http() as http:
        for status, path, body in posts:
            answer = http.post(path, content=body, headers=headers)
            assert answer.status_code == answer.json()["error"]["code"] == status, (path, body)
            assert len(answer.content) < 500
    assert {line["status"] for line in server.access_lines_of("nasty", len(posts))} == {400, 404}
    with server.log.open("rb") as log:
        log.seek(before)
        said = log.read()
    assert b"Traceback" not in said
    assert b"ERROR" not in said
    assert max(map(len, said.splitlines())) < 2000


def test_a_disconnect_gives_the_pages_back(server: Server) -> None:
    """While the stream runs it holds pages; soon after its client has left none is in use."""
    fields = completion(max_tokens=MOST_TOKENS, stream=True)
    with server.http() as http:
        with http.stream(
            "POST", "/v1/completions", json=fields, headers={"X-Request-ID": "leaver"}
        ) as answer:
            chunks = answer.iter_lines()
            for _ in range(8):
                next(chunks)
            assert eventually(lambda: server.metric("vllm:kv_cache_usage_perc") > 0, 5)
            assert server.metric("vllm:num_requests_running") == 1
        [line] = server.access_lines_of("leaver", 1)
    assert line["disconnected"]
    assert eventually(server.idle)
    assert server.metric("vllm:request_success_total") > 0


@dataclass(frozen=True)
class Visit:
    """A client of the load test. `leaves_after`: chunks, or tenths of a second where nothing is streamed."""

    prompt: str
    tokens: int
    budget: int
    stream: bool
    leaves_after: int | None


def visits(seed: int) -> list[Visit]:
    chance = random.Random(seed)
    leaving = set(chance.sample(range(CLIENTS), CLIENTS // 2))
    return [
        Visit(
            prompt=f"Story {seed}.{number}: " + "once upon a time " * chance.randint(1, 8),
            tokens=chance.randint(24, 64),
            budget=chance.choice(BUDGETS),
            stream=chance.random() < 0.7,
            leaves_after=chance.randint(0, 20) if number in leaving else None,
        )
        for number in range(CLIENTS)
    ]


async def visit(openai: AsyncOpenAI, wishes: Visit) -> int | None:
    """Tokens of the whole answer, or None for a client that left."""
    xargs = {"rkv_budget": wishes.budget, **({"rkv_buffer": 16} if wishes.budget else {})}
    fields: dict[str, Any] = {
        "model": MODEL,
        "prompt": wishes.prompt,
        "max_tokens": wishes.tokens,
        "extra_body": {"ignore_eos": True, "vllm_xargs": xargs},
    }
    if not wishes.stream:
        asking = openai.completions.create(**fields)
        patience = None if wishes.leaves_after is None else wishes.leaves_after / 10
        try:
            answer = await asyncio.wait_for(asking, patience)
        except TimeoutError:
            return None
        return int(answer.usage.completion_tokens)
    tokens, chunks = 0, 0
    stream = await openai.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    async with stream:
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            chunks += 1
            if wishes.leaves_after is not None and chunks > wishes.leaves_after:
                return None
    return tokens


def all_at_once(server: Server, seed: int) -> None:
    async def visit_all() -> list[int | BaseException | None]:
        async with server.openai("bob") as openai:
            return await asyncio.gather(
                *(visit(openai, wishes) for wishes in visits(seed)), return_exceptions=True
            )

    for wishes, tokens in zip(visits(seed), asyncio.run(visit_all()), strict=True):
        if wishes.leaves_after is None:
            assert tokens == wishes.tokens
        else:
            assert tokens in (None, wishes.tokens)
    assert eventually(server.idle)


def test_64_clients_half_of_which_leave(server: Server) -> None:
    """With mixed budgets and too few pages for all: those who stay get every token, then the pool is whole,
    and a second round leaves the server's memory as large as the first one did."""
    all_at_once(server, seed=1)
    before = server.memory()
    all_at_once(server, seed=2)
    growth = server.memory() - before
    print(f"memory grew by {growth / 2**20:.1f} MiB")
    assert growth < GROWTH_BYTES


def test_top_shows_what_the_clients_did(server: Server) -> None:
    """The route has the sums of the metrics, about the last minute, and the command shows them in a
    line; without a key it has none, and says why."""
    asked = time.monotonic()
    with server.http() as http:
        for _ in range(2):
            answer = http.post(
                "/v1/completions", json=completion(max_tokens=64, kv_cache={"budget": 16, "buffer": 16})
            )
        rounds = 2 * answer.json()["kv_cache"]["compactions"]
        assert rounds > 0 and server.idle()
        time.sleep(1)  # a reading is fresh for so long
        summary = http.get("/v1/kv_cache").json()["summary"]
    recent = summary["last_minute"]
    if time.monotonic() - asked < 50:
        assert recent["rounds"] >= rounds and recent["output_tokens"] >= 128
    assert 0 < recent["seconds"] < 75  # less than a minute of a server that is younger
    assert summary["pool"]["pages"] == server.metric("rkv_pool_pages")
    assert summary["requests"]["running"] == summary["requests"]["waiting"] == 0

    def top(key: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rkv_vllm.cli", "top", "--once", "--url", server.url]
        environment = {**os.environ, "OPENAI_API_KEY": key, "COLUMNS": "120"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    shown = top(KEYS["bob"])
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"/{summary['pool']['pages']:,}" in shown.stdout.splitlines()[1]
    refused = top("sk-unknown")
    assert (refused.returncode, refused.stdout) == (1, f"{server.url}: the API key is not accepted\n")


def test_a_pods_stop_finishes_what_runs_and_ends_with_status_0(server: Server) -> None:
    """As the Helm chart has Kubernetes stop a pod, with its probes, which have no API key: while preStop runs
    newcomers are served; then the stream gets all its tokens while newcomers are sent away, the pod is alive
    but not ready, it ends within the grace period, and nothing went wrong in the log."""
    from chart import container, pod, render  # needs Helm's binding

    objects = render({"shutdown": {"preStopSeconds": 1, "drainSeconds": DRAIN_SECONDS}})
    kubernetes, grace = container(objects), pod(objects)["terminationGracePeriodSeconds"]
    assert f"--shutdown-timeout={DRAIN_SECONDS}" in kubernetes["args"]

    def probe(name: str) -> int:
        with server.http(key=None) as kubelet:
            return kubelet.get(kubernetes[name]["httpGet"]["path"]).status_code

    assert [probe(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")] == [200, 200, 200]
    deadline = time.monotonic() + grace
    waiting = subprocess.Popen(kubernetes["lifecycle"]["preStop"]["exec"]["command"])
    fields = completion(max_tokens=MOST_TOKENS, stream=True, stream_options={"include_usage": True})
    with server.http() as http, http.stream("POST", "/v1/completions", json=fields) as answer:
        events = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        next(events)
        assert (waiting.wait(), probe("readinessProbe")) == (0, 200)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: probe("readinessProbe") == 503, 5)
        with server.http() as late:
            refused = late.post("/v1/completions", json=completion())
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert probe("livenessProbe") == 200
        rest = list(events)
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["usage"]["completion_tokens"] == MOST_TOKENS
    assert server.process.wait(deadline - time.monotonic()) == 0, tail(server.log)
    log = server.log.read_text(errors="replace")
    assert "Traceback" not in log
    assert "EngineDeadError" not in log
