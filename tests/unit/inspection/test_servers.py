"""`rkv-vllm top` before servers that answer in every way."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from rich.console import Console

from rkv_vllm.inspection.servers import Reading, Servers, table
from rkv_vllm.server.caller_rules import CallerRules
from rkv_vllm.server.protocol import PoolSums, RecentSums, RequestSums, ServerSummary

KEY = "sk-top"
SUMMARY = ServerSummary(
    model="smollm2",
    engines=2,
    requests=RequestSums(running=12, waiting=3, compacted=9, auto_full=0, auto_switched=0),
    pool=PoolSums(pages=4096, held=1024, without_compaction=2048, kept_share=0.5),
    last_minute=RecentSums(
        seconds=60.0, rounds=90, evicted_tokens=2880, output_tokens=120_000, preemptions=4
    ),
)


def answer(request: httpx.Request) -> httpx.Response:
    """A server for each name, of which only the last is none of ours."""
    bounds = CallerRules().bounds()
    match request.url.host:
        case "busy" if request.headers.get("authorization") == f"Bearer {KEY}":
            return httpx.Response(200, json=bounds.model_copy(update={"summary": SUMMARY}).model_dump())
        case "busy":
            return httpx.Response(401)
        case "silent":
            return httpx.Response(200, json=bounds.model_dump())
        case "gone":
            raise httpx.ConnectError("Connection refused")
        case _:
            return httpx.Response(200, text="<html>")


def read(*urls: str, key: str | None = KEY) -> list[Reading]:
    return asyncio.run(Servers(urls, key, httpx.MockTransport(answer)).read())


def printed(readings: list[Reading], width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(readings))
    return captured.get()


def test_a_line_says_what_a_server_does() -> None:
    """Counts are shown as they are, and sums of a minute as rates, in a line that fits into a terminal."""
    [reading] = read("http://busy/v1/")
    assert (reading.url, reading.summary) == ("http://busy", SUMMARY)
    header, line = printed([reading]).splitlines()
    assert header.split() == [
        *("server", "model", "held", "running", "waiting", "compacted"),
        *("kept", "rounds/s", "tokens/s", "preempted"),
    ]
    assert line.split() == [
        *("busy", "smollm2", "x", "2", "1,024/4,096", "12", "3", "9"),
        *("50", "%", "1.50", "2,000", "4"),
    ]


@pytest.mark.parametrize(
    ("url", "key", "problem"),
    [
        ("http://busy", None, "the API key is not accepted"),
        ("http://silent", KEY, "keeps no statistics"),
        ("http://gone", KEY, "Connection refused"),
        ("http://other", KEY, "answered with HTTP 200 as by another server"),
        ("http://busy:port", KEY, "Invalid port"),
    ],
)
def test_a_server_without_an_answer_is_named(url: str, key: str | None, problem: str) -> None:
    """It does not keep the others' lines from being shown, and its problem stands below them."""
    readings = [*read(url, key=key), *read("http://busy")]
    lines = printed(readings).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("busy")
    assert lines[2].startswith(f"{url}: ") and problem in lines[2]


def test_watching_shows_one_reading_after_the_other() -> None:
    """The table is renewed until it is stopped, and each time from a new answer."""
    shown: list[Any] = []

    async def watch() -> None:
        servers = Servers(["http://busy"], KEY, httpx.MockTransport(answer))
        task = asyncio.create_task(servers.watch(0.001, shown.append))
        while len(shown) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(watch(), 20))
    assert all(readings[0].summary == SUMMARY for readings in shown)
    assert len({id(readings) for readings in shown}) == len(shown)
