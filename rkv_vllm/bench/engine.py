"""Drives one vLLM engine and sees every step of it (glue to vLLM).

The engine core runs in a process of its own, as under `vllm serve`. What comes back is counted here and goes
no further: no detokenizer, no statistics of vLLM's front end, so that the measuring process stays out of the
way. Each output carries the scheduler's statistics and the time at which the core made it.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.engine.llm_engine import LLMEngine

from rkv_vllm.bench.engine_arguments import engine_arguments
from rkv_vllm.bench.load import LoadRequest, prompt_ids
from rkv_vllm.bench.results import EngineFacts
from rkv_vllm.bench.roofline import ModelShape
from rkv_vllm.bench.rows import STOCK, Kind, Row
from rkv_vllm.bench.token_clock import TokenClock
from rkv_vllm.bench.window import Step
from rkv_vllm.decisions.messages import take_tally
from rkv_vllm.host.pool import kv_shape
from rkv_vllm.host.preflight import engine_config, start_problems
from rkv_vllm.observability.metric_table import COMPACTION_DURATION, COMPACTIONS, EVICTED_TOKENS
from rkv_vllm.observability.tally import read
from rkv_vllm.settings.config import extra_args
from rkv_vllm.settings.error_text import one_line

EMPTY_POOL_SECONDS = 15.0


class RefusedError(Exception):
    """The engine does not take a request, or ended it early."""


class BenchEngine:
    """An engine of one kind, and the requests in it."""

    def __init__(
        self,
        kind: Kind,
        arguments: list[str],
        *,
        model: str | None,
        memory_gib: float | None,
        longest: int,
        trace_folder: str | None,
    ) -> None:
        """Starts it, which takes a minute.

        Args:
            arguments: options of `vllm serve`, the model's name or folder among them unless `model` has it.
            longest: tokens of the longest request, for a max_model_len where none is among the arguments.
            trace_folder: where traces of the profiler go; None: no profiler.

        Raises: ValueError for a configuration with which the engine does not start, where that is known
        before; vLLM's RuntimeError where it is not.
        """
        begun = time.monotonic()
        self.kind = kind
        engine_args = engine_arguments(kind, arguments, model, memory_gib, longest, trace_folder)
        config = engine_config(engine_args)
        if kind not in STOCK and (problems := start_problems(config)):
            raise ValueError(one_line(problems))
        self._engine = LLMEngine.from_vllm_config(config, UsageContext.OPENAI_API_SERVER)
        self._core: Any = self._engine.engine_core
        self._tasks = self._engine.get_supported_tasks()
        self._vocabulary = config.model_config.get_vocab_size()
        self._running: dict[str, LoadRequest] = {}
        self._asked = 0
        self._asked_at: dict[str, float] = {}
        self._tokens = TokenClock()
        self.facts = _facts(config, time.monotonic() - begun)

    # -- requests ------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        return len(self._running)

    def add(self, row: Row, load_request: LoadRequest) -> None:
        """Gives the engine a request of a row's load.

        Raises: RefusedError where vLLM does not take it.
        """
        extra = None if self.kind in STOCK else extra_args(row.budget_for(self.kind))
        params = SamplingParams(
            temperature=0,
            max_tokens=load_request.output_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        prompt = {
            "type": "token",
            "prompt_token_ids": list(prompt_ids(row.seed, load_request, self._vocabulary)),
        }
        self._asked += 1
        try:
            request = self._engine.input_processor.process_inputs(
                f"{row.name} {self._asked}", prompt, params, supported_tasks=self._tasks
            )
        except ValueError as error:
            raise RefusedError(str(error)) from None
        self._running[request.request_id] = load_request
        self._asked_at[request.request_id] = time.monotonic()
        self._core.add_request(request)

    def step(self) -> tuple[Step, list[tuple[LoadRequest, bool]]]:
        """Waits for the next step's output.

        Returns: the step, and the requests that got tokens for the first time or (True) their last one.

        Raises: RefusedError where the engine ended a request early.
        """
        while (outputs := self._core.get_output()).scheduler_stats is None:
            pass  # news of aborted requests
        stats = outputs.scheduler_stats
        step = Step(
            at=outputs.timestamp,
            running=stats.num_running_reqs,
            waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
            pool_use=stats.kv_cache_usage,
            recomputed_tokens=stats.prefix_cache_stats.preempted_queries
            - stats.prefix_cache_stats.preempted_hits,
        )
        self._read_tally(step, take_tally(stats))
        news = []
        for output in outputs.outputs:
            load_request = self._running.get(output.request_id)
            if load_request is not None and self._count(step, output):
                news.append((load_request, output.finished))
                if output.finished:
                    self._forget(output.request_id)
        step.held_tokens = self._tokens.held
        return step, news

    def leave(self, count: int) -> None:
        """Ends the newest requests, so that `count` stay."""
        newest = list(self._running)[count:]
        self._core.abort_requests(newest)
        for request_id in newest:
            self._forget(request_id)

    def abort(self) -> bool:
        """Ends all requests. Returns whether all pages came back to the pool."""
        self.leave(0)
        deadline = time.monotonic() + EMPTY_POOL_SECONDS
        # vLLM resets its prefix cache only when no request holds a page.
        while not (whole := self._core.reset_prefix_cache()) and time.monotonic() < deadline:
            time.sleep(0.05)
        while True:
            try:
                self._core.outputs_queue.get_nowait()
            except queue.Empty:
                return bool(whole)

    # -- its life ------------------------------------------------------------------------------------------

    def profile(self, begin: bool, name: str | None = None) -> None:
        self._core.profile(begin, name)

    def close(self) -> None:
        self._core.shutdown()

    # -- counting ------------------------------------------------------------------------------------------

    def _count(self, step: Step, output: EngineCoreOutput) -> bool:
        """Returns whether the request's first or last token is in it."""
        step.tokens += len(output.new_token_ids)
        for event in output.events or ():
            if event.type == EngineCoreEventType.PREEMPTED:
                step.preemptions += 1
                self._tokens.preempted(output.request_id)
        is_first = output.prefill_stats is not None
        if output.new_token_ids:
            prompt = self._running[output.request_id].prompt_tokens
            gap = self._tokens.came(output.request_id, prompt, len(output.new_token_ids), step.at)
            if gap is not None:
                step.gaps.append(gap)
            else:
                step.first_tokens.append(step.at - self._asked_at[output.request_id])
        if output.prefill_stats is not None:
            step.started += 1
            step.prompt_tokens += output.prefill_stats.num_computed_tokens
        if output.finished:
            step.finished += 1
            if output.finish_reason != FinishReason.LENGTH:
                raise RefusedError(f"the engine ended a request: {output.kv_transfer_params}")
        return is_first or output.finished

    def _forget(self, request_id: str) -> None:
        del self._running[request_id], self._asked_at[request_id]
        self._tokens.ended(request_id)

    @staticmethod
    def _read_tally(step: Step, tally: Mapping[str, int]) -> None:
        for reading in read(tally):
            match reading.metric.name:
                case COMPACTIONS.name if reading.labels[-1] == "executed":
                    step.compactions += int(reading.value)
                case EVICTED_TOKENS.name:
                    step.evicted_tokens += int(reading.value)
                case COMPACTION_DURATION.name:
                    step.compaction_seconds += reading.value * reading.times


def _facts(config: Any, start_seconds: float) -> EngineFacts:
    model, text, cache = config.model_config, config.model_config.hf_text_config, config.cache_config
    scheduler, compilation, parallel = (
        config.scheduler_config,
        config.compilation_config,
        config.parallel_config,
    )
    return EngineFacts(
        shape=ModelShape(
            layers=model.get_num_layers(parallel),
            hidden=model.get_hidden_size(),
            heads=model.get_num_attention_heads(parallel),
            kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(),
            intermediate=text.intermediate_size,
            vocabulary=model.get_vocab_size(),
            tied_embedding=text.tie_word_embeddings,
            element_bytes=model.dtype.itemsize,
            cache_element_bytes=kv_shape(config).element_bytes,
        ),
        model=model.model,
        pool_pages=cache.num_gpu_blocks - 1,  # one is vLLM's null page
        page_size=cache.block_size,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_model_len=model.max_model_len,
        prefix_caching=bool(cache.enable_prefix_caching),
        async_scheduling=bool(scheduler.async_scheduling),
        cudagraph_mode=str(compilation.cudagraph_mode),
        largest_graph=compilation.max_cudagraph_capture_size or None,
        start_seconds=start_seconds,
    )
