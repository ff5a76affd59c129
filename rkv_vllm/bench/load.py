"""Which requests an engine is given, so that a short window shows a load of long requests (pure).

In a steady state requests of all ages run side by side. To have it without running whole requests first, the
first requests are given an age: one of age a is to have generated a of its tokens already. It enters with a
longer prompt and fewer tokens to generate; when it ends, a new one of age 0 takes its place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rkv_vllm.bench.rows import Entry, Kind, Row
from rkv_vllm.settings.config import CompactionSettings

#: Fractional parts of its multiples fill (0, 1) evenly, however many of them are taken (Weyl's sequence).
GOLDEN = (5**0.5 - 1) / 2
#: Token ids from here on: the first are special in most vocabularies.
FIRST_TOKEN_ID = 1000


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A request: its number in the load, its age when it comes, prompt and output in tokens."""

    index: int
    age: int
    prompt_tokens: int
    output_tokens: int


def ages(row: Row, count: int, stayed: int = 0) -> list[int]:
    """Ages of the first `count` requests without those that `stayed`, the oldest first.

    Any two counts take the beginning of one sequence, which is spread evenly over the row's ages: engines
    that hold different numbers of requests get the same distribution. The oldest come first, because vLLM
    preempts those that came last: in a long run these are the youngest.
    """
    span = row.age_range
    places = (int((index + 0.5) * GOLDEN % 1 * len(span)) for index in range(stayed, count))
    return sorted((span[place] for place in places), reverse=True)


def slots_held(prompt: int, logical: int, settings: CompactionSettings | None) -> int:
    """KV slots that a request of `logical` tokens holds after a step, a due compaction done."""
    if settings is None:
        return logical
    first = max(prompt, settings.threshold)
    if logical < first:
        return logical
    return settings.budget + (logical - first) % settings.buffer


def entry_tokens(row: Row, entry: Entry, age: int, settings: CompactionSettings | None) -> int:
    """Prompt tokens with which a request of this age enters.

    * staggered: its prompt and all tokens it has generated; with `max_age` those modulo it.
    * compacted: as many tokens as it would hold slots. A compacted request of any age is in this state:
      what it costs depends on what it holds, not on its positions.
    * fresh: its prompt alone, longer by a part of a buffer, so that compactions do not all come in the same
      step. Such a load wants a warm-up of budget + buffer tokens.
    """
    match entry:
        case "staggered":
            return row.input + (age if row.max_age is None else age % row.max_age)
        case "compacted":
            return slots_held(row.input, row.input + age, settings)
        case "fresh":
            return row.input + age % row.buffer


def pages_held(row: Row, settings: CompactionSettings | None, page_size: int) -> float:
    """Mean pages of a request over the row's ages."""
    held = (slots_held(row.input, row.input + age, settings) for age in row.age_range)
    return sum(-(-slots // page_size) for slots in held) / len(row.age_range)


def slots_on_average(row: Row, settings: CompactionSettings | None) -> float:
    """Mean KV slots of a request over the row's ages."""
    return sum(slots_held(row.input, row.input + age, settings) for age in row.age_range) / len(row.age_range)


def requests_that_run(
    row: Row, settings: CompactionSettings | None, pages: int, page_size: int, max_num_seqs: int
) -> int:
    """Requests of mean size that a pool of `pages` usable pages holds, or the row's own number if smaller."""
    fit = min(int(pages / pages_held(row, settings, page_size)), max_num_seqs)
    asked = row.concurrency or row.batch
    return fit if asked is None else min(fit, asked)


class Load:
    """The requests of one row for one engine.

    `first` come at once; whenever one ends, `next` takes its place, so that the number in the engine stays.
    `aged` is how many of them have an age: as many as fit. The others are new, and wait behind them.
    """

    def __init__(self, row: Row, kind: Kind, running: int, stayed: int = 0) -> None:
        """
        Args:
            running: what `requests_that_run` said.
            stayed: requests that are there from the load before, which count as the first of these.

        Raises: ValueError where not one request fits.
        """
        if running == 0:
            raise ValueError("not one request fits into the pool")
        self.row = row
        self.entry = row.entry_for(kind)
        self.aged = max(running - stayed, 0)
        budget = row.budget_for(kind)
        self.first = [
            LoadRequest(index, age, entry_tokens(row, self.entry, age, budget), row.output - age)
            for index, age in enumerate(ages(row, running, stayed), stayed)
        ]
        self._asked = stayed + self.aged
        waiting = row.backlog if row.concurrency is None else row.concurrency - self._asked
        self.first += [self.next() for _ in range(waiting)]

    def next(self) -> LoadRequest:
        """A new request."""
        request = LoadRequest(self._asked, 0, self.row.input, self.row.output)
        self._asked += 1
        return request

    def batch(self, count: int, output_tokens: int | None = None) -> list[LoadRequest]:
        """`count` new requests, all alike."""
        requests = [self.next() for _ in range(count)]
        if output_tokens is None:
            return requests
        return [LoadRequest(request.index, 0, request.prompt_tokens, output_tokens) for request in requests]


def prompt_ids(seed: int, request: LoadRequest, vocabulary: int) -> Sequence[int]:
    """Random token ids: the same for any engine, and no two requests share a beginning."""
    first = min(FIRST_TOKEN_ID, vocabulary // 2)
    rng = random.Random(f"{seed} {request.index}")
    return [int(first + rng.random() * (vocabulary - first)) for _ in range(request.prompt_tokens)]
