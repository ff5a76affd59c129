"""What the metrics of a server say at a moment, summed over its engines and its API servers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric
from vllm.v1.metrics.prometheus import get_prometheus_registry

from rkv_vllm.observability.metric_table import (
    AUTO_REQUESTS,
    COMPACTED_REQUESTS,
    COMPACTIONS,
    EVICTED_TOKENS,
    PAGES_HELD,
    PAGES_WITHOUT,
    POOL_PAGES,
)

#: vLLM's own.
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
OUTPUT_TOKENS, PREEMPTIONS = "vllm:generation_tokens_total", "vllm:num_preemptions_total"


@dataclass(frozen=True)
class Sums:
    """One reading.

    Attributes:
        model: the name that clients use.
        engines: how many there are.
        running, waiting: requests.
        compacted: requests that decode with evicted tokens.
        auto_full, auto_switched: requests with budget "auto", before and after they lost any token.
        pool_pages, pages_held, pages_without_compaction: as the metrics of these names.
        rounds, evicted_tokens, output_tokens, preemptions: since the server started.
    """

    model: str
    engines: int
    running: int
    waiting: int
    compacted: int
    auto_full: int
    auto_switched: int
    pool_pages: int
    pages_held: int
    pages_without_compaction: int
    rounds: int
    evicted_tokens: int
    output_tokens: int
    preemptions: int


def read_sums() -> Sums | None:
    """The reading of this moment, from what `/metrics` shows; None where vLLM keeps no statistics."""
    return sums_of(get_prometheus_registry().collect())


def sums_of(families: Iterable[Metric]) -> Sums | None:
    """The sums of a registry's metrics; None where R-KV's are not among them."""
    engines: dict[str, str] = {}
    totals: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            if sample.name == POOL_PAGES.name:
                engines[sample.labels["engine"]] = sample.labels["model_name"]
            kind = sample.labels.get("outcome") or sample.labels.get("state") or ""
            totals[sample.name, kind] += sample.value
    if not engines:
        return None

    def total(name: str, kind: str = "") -> int:
        return round(totals[name, kind])

    return Sums(
        model=next(iter(engines.values())),
        engines=len(engines),
        running=total(RUNNING),
        waiting=total(WAITING),
        compacted=total(COMPACTED_REQUESTS.name),
        auto_full=total(AUTO_REQUESTS.name, "full"),
        auto_switched=total(AUTO_REQUESTS.name, "switched"),
        pool_pages=total(POOL_PAGES.name),
        pages_held=total(PAGES_HELD.name),
        pages_without_compaction=total(PAGES_WITHOUT.name),
        rounds=total(COMPACTIONS.name, "executed"),
        evicted_tokens=total(EVICTED_TOKENS.name),
        output_tokens=total(OUTPUT_TOKENS),
        preemptions=total(PREEMPTIONS),
    )
