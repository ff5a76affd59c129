"""The tally's way from the engine core to the API server, in vLLM's own encoding and loggers."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import KV_FETCH_STAGES, SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from rkv_vllm.decisions.messages import attach_durations, durations_of, put_tally, take_tally
from rkv_vllm.execution.stopwatch import CpuStopwatch
from rkv_vllm.observability.prometheus import RkvStatLogger
from rkv_vllm.settings.policy_table import RING_SIZE


def test_a_tally_survives_the_way_and_leaves_no_trace() -> None:
    """Through vLLM's msgpack, and what vLLM's loggers then see is what they would without us."""
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage=dict.fromkeys(KV_FETCH_STAGES, 0))
    put_tally(stats, {"rkv_evicted_tokens_total|rkv": 32, "rkv_request_kept_tokens|64": 1})
    encoded = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(encoded).scheduler_stats
    assert take_tally(received) == {"rkv_evicted_tokens_total|rkv": 32, "rkv_request_kept_tokens|64": 1}
    assert received.num_kv_fetch_reqs_by_stage == dict.fromkeys(KV_FETCH_STAGES, 0)


def config(model: str, additional_config: dict[str, Any]) -> Any:
    """As much of vLLM's configuration as the logger reads."""
    return SimpleNamespace(
        additional_config=additional_config,
        model_config=SimpleNamespace(
            served_model_name=model,
            dtype=torch.bfloat16,
            get_num_attention_heads=lambda parallel: 4,
            get_head_size=lambda: 16,
            get_num_layers=lambda parallel: 3,
        ),
        cache_config=SimpleNamespace(num_gpu_blocks=82),
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=10),
    )


def record(logger: RkvStatLogger, engine: int, tally: dict[str, int]) -> None:
    stats = SchedulerStats()
    put_tally(stats, tally)
    logger.record(stats, None, engine_idx=engine)


def test_engines_are_kept_apart_and_steps_add_up() -> None:
    """Counters of two data-parallel engines grow apart, gauges take the newest value, and what has not
    happened shows as 0. Only the pool has its size from the start: half of all pages, one of which nobody
    may hold."""
    logger = RkvStatLogger(config("two-engines", {"rkv": {"budget": 64}}), [0, 1])
    record(logger, 0, {"rkv_evicted_tokens_total|rkv": 32, "rkv_pages_held": 9})
    record(logger, 0, {"rkv_evicted_tokens_total|rkv": 32, "rkv_pages_held": 3})
    record(logger, 1, {"rkv_evicted_tokens_total|rkv": 5, "rkv_request_kept_ratio|250000": 2})

    def value(name: str, engine: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, {"model_name": "two-engines", "engine": engine, **labels})

    assert value("rkv_evicted_tokens_total", "0", policy="rkv") == 64
    assert value("rkv_evicted_tokens_total", "1", policy="rkv") == 5
    assert value("rkv_evicted_tokens_total", "1", policy="keydiff") == 0
    assert value("rkv_pages_held", "0") == 3
    assert value("rkv_pool_pages", "0") == value("rkv_pool_pages", "1") == 40
    assert value("rkv_request_kept_ratio_sum", "1") == pytest.approx(0.5)
    # Layers, rows, queries, heads, head size, bytes.
    assert value("rkv_query_window_bytes", "0") == 3 * 10 * RING_SIZE * 4 * 16 * 2


def test_a_server_without_rkv_shows_nothing() -> None:
    """vLLM loads the logger wherever this package is installed."""
    logger = RkvStatLogger(config("switched-off", {}), [0])
    logger.record(SchedulerStats(), None)
    labels = {"model_name": "switched-off", "engine": "0"}
    assert REGISTRY.get_sample_value("rkv_pages_held", labels) is None


def test_laps_survive_the_way_from_a_worker() -> None:
    """Workers pickle their outputs; one without durations reads as none."""
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    assert durations_of(output) == []
    attach_durations(output, [1500, 20])
    assert durations_of(pickle.loads(pickle.dumps(output))) == [1500, 20]


def test_a_lap_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole microseconds."""
    clock = iter([1_000_000, 4_500_000])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    stopwatch = CpuStopwatch()
    with stopwatch.timed():
        pass
    assert stopwatch.take() == [3500]
    assert stopwatch.take() == []
