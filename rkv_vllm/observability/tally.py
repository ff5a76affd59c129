"""The scheduler's tally of metrics between two steps, and how it is read on the other side (pure).

The engine core and the API server are different processes. A tally therefore crosses as a flat mapping of
text to integers: the key is the metric's name and its label values, and, for a histogram, the value observed.
Durations are whole microseconds, ratios whole millionths; `Metric.unit` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass

from rkv_vllm.decisions.messages import KEPT_FULL_CACHE, NEVER_SHORT, TOO_SHORT, Compaction, CompactionResult
from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.observability.metric_table import (
    AUTO_REQUESTS,
    AUTO_SWITCHES,
    BY_NAME,
    COMPACTED_REQUESTS,
    COMPACTION_DURATION,
    COMPACTIONS,
    COPIED_PAGES,
    DEFERRED,
    EVICTED_TOKENS,
    FREED_PAGES,
    FULL_CACHE_TOKENS,
    KEPT_RATIO,
    KEPT_TOKENS,
    MILLIONTH,
    PAGES_HELD,
    PAGES_WITHOUT,
    POOL_PAGES,
    REPLAYED_TOKENS,
    REQUESTS,
    RESERVED_PAGES,
    ROOM_PREEMPTIONS,
    STEP_SECONDS,
    UNCOMPACTED,
    UNFINISHED,
    AutoState,
    DeferralReason,
    Metric,
    SwitchCause,
    budget_class,
)
from rkv_vllm.settings.config import CompactionSettings

_SEPARATOR = "|"


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
    """What `MetricTally.take` returned, on the other side.

    Raises: KeyError for a key that no metric has.
    """
    for key, amount in tally.items():
        name, *labels = key.split(_SEPARATOR)
        metric = BY_NAME[name]
        if metric.kind == "histogram":
            observed = int(labels.pop())
            yield Reading(metric, tuple(labels), observed * metric.unit, amount)
        else:
            yield Reading(metric, tuple(labels), amount * metric.unit)


class MetricTally:
    """Collects the metric updates of one step.

    The scheduler tells it what happened, and takes it once a step. Gauges follow from counts kept here, so
    that a step's cost does not grow with the requests in it.
    """

    def __init__(self, page_size: int, pool_pages: int, groups: int = 1) -> None:
        """
        Args:
            page_size: tokens in a page.
            pool_pages: that requests can hold.
            groups: of layers that are compacted, each of which has pages of its own.
        """
        self._page_size, self._groups = page_size, groups
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
        if settings is not None and settings.auto is not None:
            self._count_auto("full", 1)

    def switched(self, cause: SwitchCause) -> None:
        """Records that a request with budget "auto" is compacted for the first time."""
        self._grow(AUTO_SWITCHES, 1, cause)
        self._count_auto("full", -1)
        self._count_auto("switched", 1)

    def preempted(self, request_id: str, computed: int) -> None:
        """Records that a request lost all its pages after it had computed `computed` tokens."""
        self._forget_saved(request_id)
        self._replayed_until[request_id] = max(computed, self._replayed_until.get(request_id, 0))

    @property
    def saved_pages(self) -> int:
        """Pages that compaction has freed from requests still in the engine."""
        return self._total_saved_pages

    @property
    def replaying(self) -> KeysView[str]:
        """Requests that have tokens to compute again."""
        return self._replayed_until.keys()

    def computed(self, request_id: str, first: int, end: int) -> None:
        """Records that one of `replaying` is scheduled to compute tokens `first` to `end - 1`."""
        until = self._replayed_until[request_id]
        self._grow(REPLAYED_TOKENS, max(min(end, until) - first, 0))
        if end >= until:
            del self._replayed_until[request_id]

    def ended(
        self, request_id: str, settings: CompactionSettings | None, result: CompactionResult, num_tokens: int
    ) -> None:
        """Records that a request has finished or was aborted, at a logical length of `num_tokens`."""
        self._forget_saved(request_id)
        self._replayed_until.pop(request_id, None)
        self._count_unfinished(settings, -1)
        self._grow(REQUESTS, 1, budget_class(settings))
        if settings is None:
            self._grow(UNCOMPACTED, 1, KEPT_FULL_CACHE)
            return
        if settings.auto is not None:
            self._count_auto("switched" if result["compactions"] else "full", -1)
            if "full_cache_tokens" in result:
                self._grow(FULL_CACHE_TOKENS, 1, str(result["full_cache_tokens"]))
        if result["compactions"] == 0:
            self._grow(UNCOMPACTED, 1, NEVER_SHORT if settings.auto else TOO_SHORT)
        kept = num_tokens - result["evicted_tokens"]
        self._grow(KEPT_TOKENS, 1, str(kept))
        self._grow(KEPT_RATIO, 1, str(round(kept / num_tokens / MILLIONTH)))

    # -- a step --------------------------------------------------------------------------------------------

    def executed(self, compaction: Compaction) -> None:
        """Records that the workers are told to run a round."""
        policy = compaction.policy
        self._grow(COMPACTIONS, 1, policy, "executed")
        self._grow(EVICTED_TOKENS, compaction.length - compaction.keep, policy)
        freed = num_pages(compaction.length, self._page_size) - num_pages(compaction.keep, self._page_size)
        self._grow(FREED_PAGES, freed * self._groups, policy)
        self._grow(COPIED_PAGES, compaction.num_copied_pages, policy)
        self._forget_saved(compaction.request_id)
        # By whole pages: what a request would hold without compaction is this much more, or one page above.
        saved = compaction.evicted // self._page_size * self._groups
        self._saved_pages[compaction.request_id] = saved
        self._total_saved_pages += saved

    def cancelled(self, compaction: Compaction) -> None:
        """Records that the request of a planned round lost all its pages before the step began."""
        self._grow(COMPACTIONS, 1, compaction.policy, "cancelled")

    def deferred(self, reason: DeferralReason) -> None:
        self._grow(DEFERRED, 1, reason)

    def preempted_for_room(self) -> None:
        self._grow(ROOM_PREEMPTIONS, 1)

    def record_durations(self, microseconds: Iterable[int]) -> None:
        """Records how long the compactions of steps took, as the workers have measured."""
        for duration in microseconds:
            self._grow(COMPACTION_DURATION, 1, str(duration))

    def step_begins(self, now: float) -> None:
        """Records the start of a step at `now`, in seconds of a clock that never goes back."""
        if self._busy_since is None:
            self._busy_since = now

    def step_ends(self, now: float, *, is_idle: bool, pages_held: int, reserved_pages: int) -> None:
        """Records the end of a step, when its tokens are known.

        Args:
            now: as at its start.
            is_idle: whether no request remains.
            pages_held: by all requests.
            reserved_pages: that are kept for those with budget "auto".
        """
        if self._busy_since is not None:
            self._grow(STEP_SECONDS, round((now - self._busy_since) / MILLIONTH))
            self._busy_since = None if is_idle else now
        self._set(PAGES_HELD.name, pages_held)
        self._set(RESERVED_PAGES.name, reserved_pages)
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

    def _count_unfinished(self, settings: CompactionSettings | None, change: int) -> None:
        key = _key(UNFINISHED, budget_class(settings))
        self._set(key, self._gauges.get(key, 0) + change)

    def _count_auto(self, state: AutoState, change: int) -> None:
        key = _key(AUTO_REQUESTS, state)
        self._set(key, self._gauges.get(key, 0) + change)

    def _forget_saved(self, request_id: str) -> None:
        self._total_saved_pages -= self._saved_pages.pop(request_id, 0)


def _key(metric: Metric, *labels: str) -> str:
    return _SEPARATOR.join((metric.name, *labels))
