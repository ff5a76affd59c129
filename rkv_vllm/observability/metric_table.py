"""The table of rkv-vllm's metrics: name, labels, unit and buckets of each (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, get_args

from rkv_vllm.decisions.messages import KEPT_FULL_CACHE, NEVER_SHORT, TOO_SHORT
from rkv_vllm.settings.config import CompactionSettings
from rkv_vllm.settings.policy_table import POLICY_NAMES
from rkv_vllm.settings.values import AUTO

#: Worth of an integer in a tally of durations, in seconds, or of ratios.
MILLIONTH = 1e-6

Outcome = Literal["executed", "cancelled"]
DeferralReason = Literal["no_pages", "no_query_row"]
#: Why a request with budget "auto" went down to its budget: those that ran grew, the next in the queue had no
#: room, it had none itself when it came, or its length was named by the request or the server.
SwitchCause = Literal["growth", "waiting", "arrival", "max_budget", "switch_at"]
AutoState = Literal["full", "switched"]

#: Upper bounds, in tokens, of the classes that requests are counted in; label values must be few.
BUDGET_BOUNDS = (256, 512, 1024, 2048, 4096)
FULL_CACHE = "full"
BUDGET_CLASSES = (*(f"le_{bound}" for bound in BUDGET_BOUNDS), f"gt_{BUDGET_BOUNDS[-1]}", AUTO, FULL_CACHE)


def budget_class(settings: CompactionSettings | None) -> str:
    """One of `BUDGET_CLASSES`; None is a request that keeps its full cache."""
    if settings is None:
        return FULL_CACHE
    if settings.auto is not None:
        return AUTO
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
    "Requests that ended without a compaction: they kept their full cache, stayed shorter than budget + "
    "buffer, or had budget auto and memory was never short.",
    {"reason": (KEPT_FULL_CACHE, TOO_SHORT, NEVER_SHORT)},
)
AUTO_SWITCHES = Metric(
    "counter",
    "rkv_auto_switches_total",
    "Requests with budget auto that lost tokens for the first time, by what made them.",
    {"cause": get_args(SwitchCause)},
)
FULL_CACHE_TOKENS = Metric(
    "histogram",
    "rkv_request_full_cache_tokens",
    "Tokens up to which a request with budget auto kept its full cache, of those that came down.",
    buckets=(256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
)
AUTO_REQUESTS = Metric(
    "gauge",
    "rkv_auto_requests",
    "Requests with budget auto in the engine, by whether they have lost tokens.",
    {"state": get_args(AutoState)},
)
RESERVED_PAGES = Metric(
    "gauge",
    "rkv_reserved_pages",
    "Pages that admission keeps for running requests with budget auto, of which they may hold more.",
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
    AUTO_SWITCHES,
    STEP_SECONDS,
    COMPACTION_DURATION,
    KEPT_TOKENS,
    KEPT_RATIO,
    FULL_CACHE_TOKENS,
    POOL_PAGES,
    PAGES_HELD,
    PAGES_WITHOUT,
    UNFINISHED,
    COMPACTED_REQUESTS,
    AUTO_REQUESTS,
    RESERVED_PAGES,
)
BY_NAME = {metric.name: metric for metric in TALLIED}
