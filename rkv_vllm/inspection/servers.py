"""The table of `rkv-vllm top`: what servers say of themselves at `GET /v1/kv_cache`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from pydantic import ValidationError
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rkv_vllm.server.protocol import KvCacheBounds, ServerSummary

TIMEOUT_SECONDS = 5.0
ROUTE = "/v1/kv_cache"


@dataclass(frozen=True)
class Reading:
    """What one server said: a summary, or else the problem in some words."""

    url: str
    summary: ServerSummary | None = None
    problem: str = ""


class Servers:
    """Asks several servers at a time."""

    def __init__(
        self, urls: Sequence[str], key: str | None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """
        Args:
            urls: with or without the `/v1` at their ends.
            key: API key, the same for all.
            transport: in place of the network.
        """
        self._urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._transport = transport

    async def read(self) -> list[Reading]:
        """One reading of each, in their order."""
        async with self._client() as http:
            return await self._read_all(http)

    async def watch(self, seconds: float, show: Callable[[list[Reading]], None]) -> None:
        """Shows a reading of each every so many seconds, until it is cancelled."""
        async with self._client() as http:
            while True:
                show(await self._read_all(http))
                await asyncio.sleep(seconds)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(headers=self._headers, timeout=TIMEOUT_SECONDS, transport=self._transport)

    async def _read_all(self, http: httpx.AsyncClient) -> list[Reading]:
        return list(await asyncio.gather(*(_read(http, url) for url in self._urls)))


async def _read(http: httpx.AsyncClient, url: str) -> Reading:
    try:
        answer = await http.get(f"{url}{ROUTE}")
    except (httpx.InvalidURL, httpx.TransportError) as error:
        return Reading(url, problem=str(error) or type(error).__name__)
    if answer.status_code == 401:
        return Reading(url, problem="the API key is not accepted")
    try:
        answer.raise_for_status()
        told = KvCacheBounds.model_validate_json(answer.content)
    except (httpx.HTTPStatusError, ValidationError):
        return Reading(
            url, problem=f"{ROUTE} is answered with HTTP {answer.status_code} as by another server"
        )
    if told.summary is None:
        return Reading(url, problem="keeps no statistics")
    return Reading(url, told.summary)


def table(readings: Sequence[Reading]) -> Group:
    """One line a server; rates and preemptions are those of its last minute."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("server", "model"):
        made.add_column(name, overflow="fold")
    for name in ("held", "running", "waiting", "compacted", "kept", "rounds/s", "tokens/s", "preempted"):
        made.add_column(name, justify="right", no_wrap=True)
    for reading in readings:
        if reading.summary is not None:
            made.add_row(reading.url.removeprefix("http://"), *_cells(reading.summary))
    problems = [Text(f"{each.url}: {each.problem}", "red") for each in readings if each.summary is None]
    return Group(*([made] if made.row_count else []), *problems)


def _cells(summary: ServerSummary) -> list[str]:
    requests, pool, recent = summary.requests, summary.pool, summary.last_minute
    kept = "-" if pool.kept_share is None else f"{100 * pool.kept_share:.0f} %"
    return [
        summary.model if summary.engines == 1 else f"{summary.model} x {summary.engines}",
        f"{pool.held:,}/{pool.pages:,}",
        f"{requests.running:,}",
        f"{requests.waiting:,}",
        f"{requests.compacted:,}",
        kept,
        _rate(recent.rounds, recent.seconds, 2),
        _rate(recent.output_tokens, recent.seconds, 0),
        f"{recent.preemptions:,}",
    ]


def _rate(count: int, seconds: float, digits: int) -> str:
    return f"{count / seconds:,.{digits}f}" if seconds else "-"
