"""What a live server's /metrics says against what its answers say."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rkv_vllm.demo.server import serving

OPTIONS = [
    *("--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log"),
    *("--block-size", "32", "--kv-cache-memory-bytes", "128M"),
    *("--max-model-len", "1024", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
    *("--kv-budget", "64", "--kv-buffer", "32"),
    *("--api-server-count", "2"),  # and with it the engine core in a process of its own
]
PROMPT = "Once upon a time there was a lighthouse. " * 5
#: Settings of a request and its number of tokens.
ASKS: list[tuple[dict[str, Any], int]] = [
    ({}, 110),
    ({"rkv_policy": "recency"}, 70),
    ({"rkv_budget": 128}, 40),
    ({"rkv_budget": 0}, 20),
]

Samples = Mapping[tuple[str, str], float]


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(model, "tiny", OPTIONS, tmp_path_factory.mktemp("metrics") / "log", lambda _: None) as url:
        yield url


def ask(url: str, settings: dict[str, Any], tokens: int) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    # A connection of its own, which either API server may take.
    answer = httpx.post(f"{url}/v1/completions", json={**body, "vllm_xargs": settings}, timeout=300)
    answer.raise_for_status()
    report: dict[str, Any] = answer.json()["kv_cache"]
    return report


def samples(url: str) -> Samples:
    """By name and the one label value that matters to the test, summed over the others."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            labels = sample.labels
            key = labels.get("policy") or labels.get("reason") or labels.get("budget_class") or ""
            found[sample.name, key] += sample.value
    return found


def test_counters_equal_the_answers_reports(url: str) -> None:
    """With two API servers, whichever answered and whichever is asked: sums of the reports, no more and no
    less; gauges are back at 0; each engine step with a compaction has a duration; vLLM's own stay."""
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(lambda of: ask(url, *of), ASKS))
    deadline = time.monotonic() + 30
    while (found := samples(url))["rkv_pages_held", ""] > 0 and time.monotonic() < deadline:
        time.sleep(0.2)  # the statistics of the last step come behind its tokens

    for policy in ("invariant", "recency"):
        of_policy = [report for report in reports if report.get("policy") == policy]
        assert found["rkv_compactions_total", policy] == sum(r["compactions"] for r in of_policy) > 0
        assert found["rkv_evicted_tokens_total", policy] == sum(r["evicted_tokens"] for r in of_policy)
    reasons = [report.get("reason") for report in reports]
    for reason in ("full cache", "shorter than budget + buffer"):
        assert found["rkv_uncompacted_requests_total", reason] == reasons.count(reason) == 1
    assert found["rkv_requests_total", "le_256"] == 3
    assert found["rkv_requests_total", "full"] == 1
    assert found["rkv_request_kept_ratio_count", ""] == 3
    assert 0 < found["rkv_compaction_duration_seconds_count", ""] <= sum(r["compactions"] for r in reports)
    assert 0 < found["rkv_compaction_duration_seconds_sum", ""] < found["rkv_step_seconds_total", ""]
    gauges = ("rkv_pages_held", "rkv_pages_without_compaction", "rkv_compacted_requests")
    assert [found[name, ""] for name in gauges] == [0, 0, 0]
    assert found["rkv_unfinished_requests", "le_256"] == found["rkv_unfinished_requests", "full"] == 0
    assert found["vllm:request_success_total", ""] == 4
