"""Steps of an engine, summed up in windows; and whether a load has become steady (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from pydantic import BaseModel

#: Points of the curve that is kept of a load.
MOST_POINTS = 300
#: Share by which the requests running may differ between two stretches of a steady load.
TOLERANCE = 0.05


@dataclass(slots=True)
class Step:
    """What came back from one step of the engine.

    Attributes:
        at: seconds, on the engine's monotonic clock, when the step's output was ready.
        tokens: output tokens.
        prompt_tokens: of prompts that were complete in this step, hits in the prefix cache left out.
        recomputed_tokens: that requests which had been preempted have to compute again.
        started, finished: requests with their first, their last token in this step.
        running, waiting: requests after the step.
        pool_use: share of the pool's pages in use.
        compaction_seconds: of compactions measured meanwhile, on the device.
        held_tokens: tokens of the requests that run, as long as they are without compaction.
        gaps: seconds since the token before, of each request that has one, until they are forgotten.
        first_tokens: likewise, seconds from asking to the first token, of each that got it in this step.
    """

    at: float
    tokens: int = 0
    prompt_tokens: int = 0
    started: int = 0
    finished: int = 0
    running: int = 0
    waiting: int = 0
    pool_use: float = 0.0
    preemptions: int = 0
    recomputed_tokens: int = 0
    compactions: int = 0
    compaction_seconds: float = 0.0
    evicted_tokens: int = 0
    held_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)

    def forget_times(self) -> None:
        """Gives back what there is one of for every token: a long run has millions of them."""
        self.gaps, self.first_tokens = [], []


class Spread(BaseModel):
    """Of some times the middle, and what all but the slowest hundredth stay within."""

    p50: float
    p99: float

    @classmethod
    def of(cls, times: Iterable[float]) -> Spread | None:
        """None where there is none."""
        ordered = sorted(times)
        if not ordered:
            return None
        return cls(**{f"p{share}": ordered[(len(ordered) - 1) * share // 100] for share in (50, 99)})


class Window(BaseModel):
    """A stretch of steps.

    Attributes:
        pages_per_request: pages in use over requests running, on average.
        tokens_per_request: tokens that they have, of which those pages hold a part.
        token_seconds: from one token of a request to its next.
        first_token_seconds: from asking to a request's first token.
        client_share: CPU time of the measuring process over the window's seconds.
    """

    seconds: float
    steps: int
    output_tokens: int
    tokens_per_second: float
    step_milliseconds: float
    running: float
    waiting: float
    pool_use: float
    most_pool_use: float
    pages_per_request: float
    prompt_tokens: int
    started: int
    finished: int
    preemptions: int
    recomputed_tokens: int
    compactions: int
    evicted_tokens: int
    compaction_milliseconds_per_step: float
    client_share: float
    # Files that are older do not have these.
    tokens_per_request: float | None = None
    token_seconds: Spread | None = None
    first_token_seconds: Spread | None = None


def summarise(begun: float, steps: Sequence[Step], pool_pages: int, client_seconds: float) -> Window:
    """A window that began at `begun`, when the output of the step before came.

    Args:
        pool_pages: pages that requests can hold.
        client_seconds: CPU time that the measuring process took for it.
    """
    seconds = steps[-1].at - begun
    tokens = sum(step.tokens for step in steps)
    running = fmean(step.running for step in steps)
    pool_use = fmean(step.pool_use for step in steps)
    compaction_seconds = sum(step.compaction_seconds for step in steps)
    return Window(
        seconds=seconds,
        steps=len(steps),
        output_tokens=tokens,
        tokens_per_second=tokens / seconds,
        step_milliseconds=1000 * seconds / len(steps),
        running=running,
        waiting=fmean(step.waiting for step in steps),
        pool_use=pool_use,
        most_pool_use=max(step.pool_use for step in steps),
        pages_per_request=pool_use * pool_pages / running if running else 0.0,
        prompt_tokens=sum(step.prompt_tokens for step in steps),
        started=sum(step.started for step in steps),
        finished=sum(step.finished for step in steps),
        preemptions=sum(step.preemptions for step in steps),
        recomputed_tokens=sum(step.recomputed_tokens for step in steps),
        compactions=sum(step.compactions for step in steps),
        evicted_tokens=sum(step.evicted_tokens for step in steps),
        compaction_milliseconds_per_step=1000 * compaction_seconds / len(steps),
        client_share=client_seconds / seconds,
        tokens_per_request=fmean(step.held_tokens for step in steps) / running if running else None,
        token_seconds=Spread.of(gap for step in steps for gap in step.gaps),
        first_token_seconds=Spread.of(each for step in steps for each in step.first_tokens),
    )


def is_steady(running: Sequence[int], stretch: int) -> bool:
    """Whether as many requests ran, on average, in the last `stretch` steps as in those before."""
    if len(running) < 2 * stretch:
        return False
    before, now = fmean(running[-2 * stretch : -stretch]), fmean(running[-stretch:])
    return abs(now - before) <= max(TOLERANCE * before, 0.5)


class Point(BaseModel):
    """A point of a load's curve: seconds since it began, and means over the steps since the point before."""

    seconds: float
    running: float
    pool_use: float
    tokens_per_second: float


def curve(begun: float, steps: Sequence[Step]) -> list[Point]:
    """At most `MOST_POINTS` points, of equally many steps each."""
    stride = max(-(-len(steps) // MOST_POINTS), 1)
    points, since = [], begun
    for start in range(0, len(steps), stride):
        part = steps[start : start + stride]
        until = part[-1].at
        tokens = sum(step.tokens for step in part)
        points.append(
            Point(
                seconds=round(until - begun, 3),
                running=round(fmean(step.running for step in part), 2),
                pool_use=round(fmean(step.pool_use for step in part), 4),
                tokens_per_second=round(tokens / (until - since), 1) if until > since else 0.0,
            )
        )
        since = until
    return points
