"""`rkv-vllm top`: what running servers do, as a live table."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated

import typer


def top(
    urls: Annotated[
        list[str] | None,
        typer.Option(
            "--url", help="Of a server; may be given several times (default: http://localhost:8000)."
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Where the servers ask for one.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the table once, and end.")] = False,
) -> None:
    """Show what running servers do: pool, requests, what is kept of the cache, and rates.

    Held are pages of the pool; kept is their share of what the same requests would hold without compaction.

    Rates and preemptions are those of the last minute. With --once the status is 1 where one has no answer.
    """
    from rich.console import Console
    from rich.live import Live

    from rkv_vllm.inspection.servers import Servers, table

    servers, console = Servers(urls or ["http://localhost:8000"], api_key), Console()
    if once:
        readings = asyncio.run(servers.read())
        console.print(table(readings))
        raise typer.Exit(any(reading.summary is None for reading in readings))
    with suppress(KeyboardInterrupt), Live(console=console, screen=True) as live:
        asyncio.run(servers.watch(seconds, lambda readings: live.update(table(readings), refresh=True)))
