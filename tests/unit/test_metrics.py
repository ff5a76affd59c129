"""The tally's way from the engine core to the API server, in vLLM's own encoding and loggers."""

from __future__ import annotations

import pickle
import time

import pytest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import KV_FETCH_STAGES, SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from rkv_vllm.metrics import put_tally, take_tally
from rkv_vllm.stopwatch import CpuStopwatch, attach_laps, laps_of


def test_a_tally_survives_the_way_and_leaves_no_trace() -> None:
    """Through vLLM's msgpack, and what vLLM's loggers then see is what they would without us."""
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage=dict.fromkeys(KV_FETCH_STAGES, 0))
    put_tally(stats, {"rkv_evicted_tokens_total|rkv": 32, "rkv_request_kept_tokens|64": 1})
    encoded = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(encoded).scheduler_stats
    assert take_tally(received) == {"rkv_evicted_tokens_total|rkv": 32, "rkv_request_kept_tokens|64": 1}
    assert received.num_kv_fetch_reqs_by_stage == dict.fromkeys(KV_FETCH_STAGES, 0)


def test_laps_survive_the_way_from_a_worker() -> None:
    """Workers pickle their outputs; one without laps reads as none."""
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    assert laps_of(output) == []
    attach_laps(output, [1500, 20])
    assert laps_of(pickle.loads(pickle.dumps(output))) == [1500, 20]


def test_a_lap_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole microseconds."""
    clock = iter([1_000_000, 4_500_000])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    stopwatch = CpuStopwatch()
    with stopwatch.lap():
        pass
    assert stopwatch.take() == [3500]
    assert stopwatch.take() == []
