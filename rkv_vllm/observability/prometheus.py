"""Prometheus metrics of the API server, told by the engine core (glue to vLLM's statistics).

The way of a count: the scheduler tallies it (`tally.py`), and once a step the tally leaves with vLLM's
own `SchedulerStats`. That is a dataclass without room for more, encoded by msgspec field by field, so that
extra attributes are lost. Of its free-form fields, `kv_connector_stats` cannot be used: vLLM's loggers hand
it to the KV connector, and fail where there is none. `num_kv_fetch_reqs_by_stage`, a dict of text to int,
can: vLLM reads three keys of its own there by name, and others would at most add a line about KV fetches to
its log. Our keys begin with `rkv_`, and `RkvStatLogger`, which vLLM calls before its own loggers, takes
them out again. How long compactions took comes from the workers, on a step's output (`stopwatch.py`).

A tally carries differences. vLLM gives each step's statistics to exactly one API server, so that counters
stay true under several of them: each adds up what it got, and prometheus_client's multiprocess mode, which
vLLM switches on then, adds up the processes. Gauges are sent when they change; the most recent one counts.
Nothing comes before the first step, so that the size of the pool is set here at start.
Engines under data parallelism differ in the label `engine`.

vLLM finds `RkvStatLogger` by the entry point `vllm.stat_logger_plugins`, in every server in which this
package is installed; where R-KV is not switched on it shows nothing. vLLM loads such plugins for `AsyncLLM`
only: an offline `LLM` has no metrics, and says in each result what compaction did.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from rkv_vllm import __version__
from rkv_vllm.decisions.messages import take_tally
from rkv_vllm.decisions.query_rows import num_query_rows
from rkv_vllm.observability.metric_table import POOL_PAGES, TALLIED, Metric
from rkv_vllm.observability.tally import read
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.policy_table import RING_SIZE

COMMON_LABELS = ("model_name", "engine")

QUERY_RING_BYTES = Metric(
    "gauge", "rkv_query_window_bytes", "Memory of the query window in each worker, all layers together."
)
BUILD_INFO = Metric(
    "gauge", "rkv_build_info", "Always 1; versions and the server's defaults for requests without settings."
)
_BUILD_LABELS = ("version", "vllm_version", "budget", "buffer", "policy")


class RkvStatLogger(AggregateStatLoggerBase):
    """Shows what the engines of one API server tallied."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._is_on = "rkv" in vllm_config.additional_config
        if not self._is_on:
            return
        self._model_name = vllm_config.model_config.served_model_name
        config = RkvConfig.from_additional_config(vllm_config.additional_config)
        collectors = _collectors()
        # vLLM has the sum over all engines, which are alike; each engine's first tally has its own.
        pool_pages = vllm_config.cache_config.num_gpu_blocks // len(engine_indexes) - 1  # less the null page
        for engine in map(str, engine_indexes):
            for metric in TALLIED:
                for labels in metric.label_values():
                    collectors[metric.name].labels(self._model_name, engine, *labels)
            common = (self._model_name, engine)
            collectors[POOL_PAGES.name].labels(*common).set(pool_pages)
            collectors[QUERY_RING_BYTES.name].labels(*common).set(query_ring_bytes(vllm_config))
            collectors[BUILD_INFO.name].labels(*common, *_build_labels(config)).set(1)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if not self._is_on or scheduler_stats is None:
            return
        collectors = _collectors()
        for reading in read(take_tally(scheduler_stats)):
            labels = (self._model_name, str(engine_idx), *reading.labels)
            collector = collectors[reading.metric.name].labels(*labels)
            match reading.metric.kind:
                case "counter":
                    collector.inc(reading.value)
                case "gauge":
                    collector.set(reading.value)
                case "histogram":
                    for _ in range(reading.times):
                        collector.observe(reading.value)

    def log_engine_initialized(self) -> None:
        pass


def query_ring_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of the ring of queries in each worker: [layers, rows, RING_SIZE, query heads, head size]."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    rows = num_query_rows(vllm_config.scheduler_config.max_num_seqs)
    query = model.get_num_attention_heads(parallel) * model.get_head_size()
    element = torch.empty(0, dtype=model.dtype).element_size()
    return model.get_num_layers(parallel) * rows * RING_SIZE * query * element


def _build_labels(config: RkvConfig) -> tuple[str, ...]:
    from vllm import __version__ as vllm_version

    budget = "full" if config.budget is None else str(config.budget)
    return (__version__, vllm_version, budget, str(config.buffer), config.policy)


@cache
def _collectors() -> dict[str, Any]:
    """Made once a process, when the first logger is: vLLM has chosen prometheus_client's mode by then."""
    made: dict[str, Any] = {}
    for metric in TALLIED:
        labels = (*COMMON_LABELS, *metric.labels)
        match metric.kind:
            case "counter":
                made[metric.name] = Counter(metric.name, metric.help, labels)
            case "gauge":
                made[metric.name] = Gauge(metric.name, metric.help, labels, multiprocess_mode="mostrecent")
            case "histogram":
                made[metric.name] = Histogram(metric.name, metric.help, labels, buckets=metric.buckets)
    for metric, more in ((QUERY_RING_BYTES, ()), (BUILD_INFO, _BUILD_LABELS)):
        labels = (*COMMON_LABELS, *more)
        made[metric.name] = Gauge(metric.name, metric.help, labels, multiprocess_mode="mostrecent")
    return made
