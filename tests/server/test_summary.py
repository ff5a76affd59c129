"""What the server says of the last minute."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rkv_vllm.observability.sums import Sums
from rkv_vllm.server import summary
from rkv_vllm.server.summary import Summary

SUMS = Sums(
    model="m",
    engines=1,
    running=3,
    waiting=2,
    compacted=1,
    auto_full=0,
    auto_switched=0,
    pool_pages=99,
    pages_held=30,
    pages_without_compaction=120,
    rounds=0,
    evicted_tokens=0,
    output_tokens=0,
    preemptions=0,
)


class Server:
    """Makes a round a second, each evicting 32 tokens of 50 that were written, and counts who looks."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.looks = 0
        self.summary = Summary(self._read, lambda: self.seconds)

    def _read(self) -> Sums:
        self.looks += 1
        rounds = int(self.seconds)
        return replace(SUMS, rounds=rounds, evicted_tokens=32 * rounds, output_tokens=50 * rounds)


def test_sums_are_about_the_last_minute() -> None:
    """Soon after the start they cover the time since; later a minute, whenever somebody asked."""
    server = Server()
    first = server.summary.now()
    assert first is not None and first.last_minute.model_dump() == dict.fromkeys(
        ("seconds", "rounds", "evicted_tokens", "output_tokens", "preemptions"), 0
    )
    assert first.pool.kept_share == 0.25
    for after in range(10, 600, 10):
        server.seconds = 1000.0 + after
        told = server.summary.now()
        assert told is not None
        seconds = min(after, 60)
        assert told.last_minute.seconds == told.last_minute.rounds == seconds
        assert told.last_minute.evicted_tokens == 32 * seconds
        assert told.last_minute.output_tokens == 50 * seconds


def test_who_asks_often_is_told_the_same_second() -> None:
    """A client that hammers the route does not make the server read its metrics each time."""
    server = Server()
    for _ in range(100):
        server.seconds += 0.05
        assert server.summary.now() is not None
    assert server.looks == 5


def test_nothing_held_has_no_share() -> None:
    """An idle server says null where a share would be of nothing."""
    idle = Summary(lambda: replace(SUMS, pages_held=0, pages_without_compaction=0)).now()
    assert idle is not None and idle.pool.kept_share is None


def test_samples_are_taken_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first question after a while is answered about that while, and the end of the block ends it."""
    monkeypatch.setattr(summary, "SAMPLE_SECONDS", 0.001)
    server = Server()

    async def ask() -> None:
        async with server.summary.sampling():
            while server.looks < 5:
                server.seconds += 10
                await asyncio.sleep(0.002)
        looks = server.looks
        server.seconds += 10
        await asyncio.sleep(0.01)
        assert server.looks == looks

    asyncio.run(asyncio.wait_for(ask(), 20))
    told = server.summary.now()
    assert told is not None and told.last_minute.rounds >= 40
