"""What the server does right now, in sums, for `GET /v1/kv_cache` and `rkv-vllm top`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rkv_vllm.observability.sums import Sums, read_sums
from rkv_vllm.server.protocol import PoolSums, RecentSums, RequestSums, ServerSummary

WINDOW_SECONDS, SAMPLE_SECONDS = 60.0, 10.0
#: Metrics are read so often at most, however often a client asks.
FRESH_SECONDS = 1.0


class Summary:
    """Remembers what its metrics said during the last minute."""

    def __init__(
        self, read: Callable[[], Sums | None] = read_sums, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            read: gives the sums of the moment; None where the server keeps no statistics.
            clock: seconds, which never go back.
        """
        self._read = read
        self._clock = clock
        #: By time, the first of them a minute old or the oldest there is.
        self._samples: deque[tuple[float, Sums]] = deque()

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Looks at the metrics every few seconds, as long as the block lasts."""
        task = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            task.cancel()

    async def _sample(self) -> None:
        while True:
            self.now()
            await asyncio.sleep(SAMPLE_SECONDS)

    def now(self) -> ServerSummary | None:
        """The summary of this second; None where the server keeps no statistics."""
        clock = self._clock()
        if not self._samples or clock - self._samples[-1][0] >= FRESH_SECONDS:
            if (read := self._read()) is None:
                return None
            self._samples.append((clock, read))
        while len(self._samples) > 1 and self._samples[1][0] <= clock - WINDOW_SECONDS:
            self._samples.popleft()
        (began, before), (now, sums) = self._samples[0], self._samples[-1]
        held, without = sums.pages_held, sums.pages_without_compaction
        return ServerSummary(
            model=sums.model,
            engines=sums.engines,
            requests=RequestSums(
                running=sums.running,
                waiting=sums.waiting,
                compacted=sums.compacted,
                auto_full=sums.auto_full,
                auto_switched=sums.auto_switched,
            ),
            pool=PoolSums(
                pages=sums.pool_pages,
                held=held,
                without_compaction=without,
                kept_share=round(held / without, 4) if without else None,
            ),
            last_minute=RecentSums(
                seconds=round(now - began, 3),
                rounds=sums.rounds - before.rounds,
                evicted_tokens=sums.evicted_tokens - before.evicted_tokens,
                output_tokens=sums.output_tokens - before.output_tokens,
                preemptions=sums.preemptions - before.preemptions,
            ),
        )
