"""What rkv-vllm counts: the table of its metrics, and the scheduler's tally between two steps (pure).

The engine core and the API server are different processes. A tally therefore crosses as a flat mapping of
text to integers: the key is the metric's name and its label values, and, for a histogram, the value observed.
Durations are whole microseconds, ratios whole millionths; `Metric.unit` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from rkv_vllm.decisions.messages import Compaction, CompactionResult, TokenCompaction
from rkv_vllm.settings.config import POLICY_NAMES, CompactionSettings

MILLIONTH = 1e-6
_SEPARATOR = "|"

Outcome = Literal["executed", "cancelled"]
DeferralReason = Literal["no_pages", "no_query_row"]

#: Upper bounds, in tokens, of the classes that requests are counted in; label values must be few.
BUDGET_BOUNDS = (256, 512, 1024, 2048, 4096)
FULL_CACHE = "full"
BUDGET_CLASSES = (*(f"le_{bound}" for bound in BUDGET_BOUNDS), f"gt_{BUDGET_BOUNDS[-1]}", FULL_CACHE)


def budget_class(settings: CompactionSettings | None) -> str:
    """One of `BUDGET_CLASSES`; None is a request that keeps its full cache."""
    if settings is None:
        return FULL_CACHE
    fitting = (f"le_{bound}" for bound in BUDGET_BOUNDS if settings.budget <= bound)
    return next(fitting, f"gt_{BUDGET_BOUNDS[-1]}")


@dataclass(frozen=True)
class Metric:
    """One metric as Prometheus shows it, beside the labels `model_name` and `engine` that all have.

    Attributes:
        labels: name and all values of each further label.
        unit: what one of the integers in a tally is worth.
        buckets: upper bounds; of a histogram only.
    """

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unit: float = 1.0
    buckets: tuple[float, ...] = ()

    def label_values(self) -> Iterator[tuple[str, ...]]:
        """Every combination there is, so that each can be shown as 0 before it happens."""
        return product(*self.labels.values())


COMPACTIONS = Metric(
    "counter",
    "rkv_compactions_total",
    "Compactions planned: executed by the workers, or cancelled because the request was preempted in the "
    "same step.",
    {"policy": POLICY_NAMES, "outcome": ("executed", "cancelled")},
)
EVICTED_TOKENS = Metric(
    "counter",
    "rkv_evicted_tokens_total",
    "Tokens evicted by executed compactions, those replayed after a preemption included.",
    {"policy": POLICY_NAMES},
)
FREED_PAGES = Metric(
    "counter",
    "rkv_freed_pages_total",
    "Pages by which executed compactions shortened their requests.",
    {"policy": POLICY_NAMES},
)
COPIED_PAGES = Metric(
    "counter",
    "rkv_copied_pages_total",
    "Pages that survivors were copied out of, because another request or the prefix cache holds them.",
    {"policy": POLICY_NAMES},
)
DEFERRED = Metric(
    "counter",
    "rkv_deferred_compactions_total",
    "Times that a due compaction had to wait: its request was preempted for want of pages, or waited a step "
    "for a row of the query window.",
    {"reason": ("no_pages", "no_query_row")},
)
ROOM_PREEMPTIONS = Metric(
    "counter",
    "rkv_room_preemptions_total",
    "Requests preempted so that a compaction found pages to copy shared ones to.",
)
REPLAYED_TOKENS = Metric(
    "counter",
    "rkv_replayed_tokens_total",
    "Tokens computed again after a preemption; hits in the prefix cache are not.",
)
REQUESTS = Metric(
    "counter",
    "rkv_requests_total",
    "Requests that ended, by the budget in force in tokens.",
    {"budget_class": BUDGET_CLASSES},
)
UNCOMPACTED = Metric(
    "counter",
    "rkv_uncompacted_requests_total",
    "Requests that ended without a compaction: they kept their full cache, or stayed shorter than budget + "
    "buffer.",
    {"reason": ("full_cache", "short")},
)
STEP_SECONDS = Metric(
    "counter",
    "rkv_step_seconds_total",
    "Wall-clock time during which the engine had requests to run.",
    unit=MILLIONTH,
)
COMPACTION_DURATION = Metric(
    "histogram",
    "rkv_compaction_duration_seconds",
    "Time that all compactions of one step took together: by CUDA events on a GPU, by the clock on a CPU.",
    unit=MILLIONTH,
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
KEPT_TOKENS = Metric(
    "histogram",
    "rkv_request_kept_tokens",
    "Tokens of a request with a budget that were not evicted when it ended.",
    buckets=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
)
KEPT_RATIO = Metric(
    "histogram",
    "rkv_request_kept_ratio",
    "Share of a request's tokens that were not evicted when it ended; of requests with a budget.",
    unit=MILLIONTH,
    buckets=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
POOL_PAGES = Metric("gauge", "rkv_pool_pages", "Pages that requests can hold.")
PAGES_HELD = Metric("gauge", "rkv_pages_held", "Pages that requests hold.")
PAGES_WITHOUT = Metric(
    "gauge",
    "rkv_pages_without_compaction",
    "Pages that the same requests would hold at least, had nothing been evicted.",
)
UNFINISHED = Metric(
    "gauge",
    "rkv_unfinished_requests",
    "Requests in the engine, running or waiting, by the budget in force in tokens.",
    {"budget_class": BUDGET_CLASSES},
)
COMPACTED_REQUESTS = Metric(
    "gauge",
    "rkv_compacted_requests",
    "Requests in the engine that decode with evicted tokens.",
)
#: What the scheduler's tally is about.
TALLIED = (
    COMPACTIONS,
    EVICTED_TOKENS,
    FREED_PAGES,
    COPIED_PAGES,
    DEFERRED,
    ROOM_PREEMPTIONS,
    REPLAYED_TOKENS,
    REQUESTS,
    UNCOMPACTED,
    STEP_SECONDS,
    COMPACTION_DURATION,
    KEPT_TOKENS,
    KEPT_RATIO,
    POOL_PAGES,
    PAGES_HELD,
    PAGES_WITHOUT,
    UNFINISHED,
    COMPACTED_REQUESTS,
)
_BY_NAME = {metric.name: metric for metric in TALLIED}


@dataclass(frozen=True)
class Reading:
    """One entry of a tally.

    `value`: what a counter grew by, a gauge's new value, or what a histogram observed `times` times; in the
    metric's base unit.
    """

    metric: Metric
    labels: tuple[str, ...]
    value: float
    times: int = 1


def read(tally: Mapping[str, int]) -> Iterator[Reading]:
    """What `Counters.take` returned, on the other side.

    Raises: KeyError for a key that no metric has.
    """
    for key, amount in tally.items():
        name, *labels = key.split(_SEPARATOR)
        metric = _BY_NAME[name]
        if metric.kind == "histogram":
            observed = int(labels.pop())
            yield Reading(metric, tuple(labels), observed * metric.unit, amount)
        else:
            yield Reading(metric, tuple(labels), amount * metric.unit)


class Counters:
    """Told by the scheduler what happened; emptied once a step.

    Gauges follow from counts kept here, so that a step's cost does not grow with the requests in it.
    """

    def __init__(self, page_size: int, pool_pages: int) -> None:
        self._page_size = page_size
        self._gauges: dict[str, int] = {}
        self._tally: dict[str, int] = {}
        self._set(POOL_PAGES.name, pool_pages)
        self._saved_pages: dict[str, int] = {}  # of each request that has evicted tokens
        self._total_saved_pages = 0
        self._replayed_until: dict[str, int] = {}
        self._busy_since: float | None = None

    # -- a request's life ----------------------------------------------------------------------------------

    def arrived(self, settings: CompactionSettings | None) -> None:
        self._count_unfinished(settings, 1)

    def preempted(self, request_id: str, computed: int) -> None:
        """It lost all its pages after it had computed so many tokens."""
        self._forget_saved(request_id)
        self._replayed_until[request_id] = max(computed, self._replayed_until.get(request_id, 0))

    @property
    def saved_pages(self) -> int:
        """Whole pages that live requests would hold besides, had nothing been evicted."""
        return self._total_saved_pages

    @property
    def replaying(self) -> KeysView[str]:
        """Requests that have tokens to compute again."""
        return self._replayed_until.keys()

    def computed(self, request_id: str, first: int, end: int) -> None:
        """One of `replaying` is scheduled to compute tokens first to end - 1."""
        until = self._replayed_until[request_id]
        self._grow(REPLAYED_TOKENS, max(min(end, until) - first, 0))
        if end >= until:
            del self._replayed_until[request_id]

    def ended(
        self, request_id: str, settings: CompactionSettings | None, result: CompactionResult, num_tokens: int
    ) -> None:
        """It has finished or was aborted, at a logical length of `num_tokens`."""
        self._forget_saved(request_id)
        self._replayed_until.pop(request_id, None)
        self._count_unfinished(settings, -1)
        self._grow(REQUESTS, 1, budget_class(settings))
        if settings is None:
            self._grow(UNCOMPACTED, 1, "full_cache")
            return
        if result["compactions"] == 0:
            self._grow(UNCOMPACTED, 1, "short")
        kept = num_tokens - result["evicted_tokens"]
        self._grow(KEPT_TOKENS, 1, str(kept))
        self._grow(KEPT_RATIO, 1, str(round(kept / num_tokens / MILLIONTH)))

    # -- a step --------------------------------------------------------------------------------------------

    def executed(self, compaction: Compaction) -> None:
        """The workers are told to run it."""
        policy = compaction.policy
        self._grow(COMPACTIONS, 1, policy, "executed")
        self._grow(EVICTED_TOKENS, compaction.length - compaction.keep, policy)
        self._grow(FREED_PAGES, self._pages(compaction.length) - self._pages(compaction.keep), policy)
        if isinstance(compaction, TokenCompaction):  # by page nothing is copied
            pages = zip(compaction.source_pages, compaction.target_pages, strict=False)
            self._grow(COPIED_PAGES, sum(source != target for source, target in pages), policy)
        self._forget_saved(compaction.request_id)
        # By whole pages: what a request would hold without compaction is this much more, or one page above.
        self._saved_pages[compaction.request_id] = saved = compaction.evicted // self._page_size
        self._total_saved_pages += saved

    def cancelled(self, compaction: Compaction) -> None:
        """It was planned, and its request lost all its pages before the step began."""
        self._grow(COMPACTIONS, 1, compaction.policy, "cancelled")

    def deferred(self, reason: DeferralReason) -> None:
        self._grow(DEFERRED, 1, reason)

    def preempted_for_room(self) -> None:
        self._grow(ROOM_PREEMPTIONS, 1)

    def record_durations(self, microseconds: Iterable[int]) -> None:
        """Times of steps' compactions that the workers have measured meanwhile."""
        for duration in microseconds:
            self._grow(COMPACTION_DURATION, 1, str(duration))

    def step_begins(self, now: float) -> None:
        """`now` in seconds, of a clock that never goes back."""
        if self._busy_since is None:
            self._busy_since = now

    def step_ends(self, now: float, *, is_idle: bool, pages_held: int) -> None:
        """Its tokens are known; `is_idle`: no request is left."""
        if self._busy_since is not None:
            self._grow(STEP_SECONDS, round((now - self._busy_since) / MILLIONTH))
            self._busy_since = None if is_idle else now
        self._set(PAGES_HELD.name, pages_held)
        self._set(PAGES_WITHOUT.name, pages_held + self._total_saved_pages)
        self._set(COMPACTED_REQUESTS.name, len(self._saved_pages))

    def take(self) -> dict[str, int]:
        """The tally since the last call: what grew, what was observed, and the gauges that changed."""
        tally, self._tally = self._tally, {}
        return tally

    def _grow(self, metric: Metric, amount: int, *labels: str) -> None:
        if amount:
            key = _key(metric, *labels)
            self._tally[key] = self._tally.get(key, 0) + amount

    def _set(self, key: str, value: int) -> None:
        if self._gauges.get(key) != value:
            self._gauges[key] = self._tally[key] = value

    def _pages(self, slots: int) -> int:
        return -(-slots // self._page_size)

    def _count_unfinished(self, settings: CompactionSettings | None, change: int) -> None:
        key = _key(UNFINISHED, budget_class(settings))
        self._set(key, self._gauges.get(key, 0) + change)

    def _forget_saved(self, request_id: str) -> None:
        self._total_saved_pages -= self._saved_pages.pop(request_id, 0)


def _key(metric: Metric, *labels: str) -> str:
    return _SEPARATOR.join((metric.name, *labels))
