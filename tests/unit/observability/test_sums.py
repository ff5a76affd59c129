"""The sums that `GET /v1/kv_cache` tells, from a registry of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from rkv_vllm.observability.sums import Sums, sums_of


def test_engines_and_policies_are_added_up() -> None:
    """Two engines' metrics become one sum each; cancelled rounds and other metrics do not count."""
    registry = CollectorRegistry()
    common = ["model_name", "engine"]

    def gauge(name: str, *values: int, **labels: str) -> None:
        metric = Gauge(name, "-", [*common, *labels], registry=registry)
        for engine, value in enumerate(values):
            metric.labels("m", str(engine), *labels.values()).set(value)

    gauge("rkv_pool_pages", 40, 41)
    gauge("rkv_pages_held", 10, 5)
    gauge("rkv_pages_without_compaction", 20, 10)
    gauge("rkv_compacted_requests", 3, 1)
    gauge("vllm:num_requests_running", 4, 2)
    gauge("vllm:num_requests_waiting", 0, 7)
    gauge("vllm:num_requests_swapped", 99, 99)
    auto = Gauge("rkv_auto_requests", "-", [*common, "state"], registry=registry)
    auto.labels("m", "0", "full").set(2)
    auto.labels("m", "1", "switched").set(1)
    rounds = Counter("rkv_compactions_total", "-", [*common, "policy", "outcome"], registry=registry)
    for engine, policy, outcome, count in (
        ("0", "rkv", "executed", 5),
        ("1", "rkv", "executed", 6),
        ("1", "snapkv", "executed", 1),
        ("1", "rkv", "cancelled", 50),
    ):
        rounds.labels("m", engine, policy, outcome).inc(count)
    evicted = Counter("rkv_evicted_tokens_total", "-", [*common, "policy"], registry=registry)
    evicted.labels("m", "0", "rkv").inc(320)
    evicted.labels("m", "1", "snapkv").inc(32)
    for name, count in (("vllm:generation_tokens", 1000), ("vllm:num_preemptions", 8)):
        Counter(name, "-", common, registry=registry).labels("m", "1").inc(count)

    assert sums_of(registry.collect()) == Sums(
        model="m",
        engines=2,
        running=6,
        waiting=7,
        compacted=4,
        auto_full=2,
        auto_switched=1,
        pool_pages=81,
        pages_held=15,
        pages_without_compaction=30,
        rounds=12,
        evicted_tokens=352,
        output_tokens=1000,
        preemptions=8,
    )


def test_without_our_metrics_there_are_no_sums() -> None:
    """A server that keeps no statistics is not taken for one that does nothing."""
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "-", registry=registry).set(3)
    assert sums_of(registry.collect()) is None
