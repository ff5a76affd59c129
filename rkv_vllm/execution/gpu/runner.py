"""Adapter for vLLM's Model Runner V2: physical lengths for attention, logical ones for all else.

CUDA graphs bake addresses, not contents. What attention reads (sequence lengths, slot mapping, places in the
query ring) therefore lives in buffers of fixed address, which are filled anew before each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState

from rkv_vllm.decisions.messages import (
    PageCompaction,
    PageReport,
    TokenCompaction,
    attach_durations,
    plan_of,
    with_reports,
)
from rkv_vllm.decisions.query_rows import num_query_rows
from rkv_vllm.execution.gpu.compactor import GpuCompactor
from rkv_vllm.execution.gpu.graph_choice import prefer_fastest
from rkv_vllm.execution.gpu.query_window import GpuQueryWindow
from rkv_vllm.kernels.step_inputs import prepare_physical
from rkv_vllm.policies import make_policies
from rkv_vllm.settings.config import WINDOW, RkvConfig

#: `query_rows` of a request whose queries are not recorded.
_NOT_RECORDED = -1


class PhysicalLengths:
    """What compaction changed about each request slot, on the host and on the device.

    Attributes:
        evicted, query_rows: per request slot, written on the host and read by the device.
        seq_lens [max requests], positions [max tokens]: physical, of the batch about to run.
        is_real: whether those were filled for the batch about to run; otherwise it is one of vLLM's dummies,
            which hold no compacted request.
    """

    def __init__(self, max_num_requests: int, max_num_tokens: int, device: torch.device) -> None:
        self.evicted = UvaBackedTensor(max_num_requests, dtype=torch.int32)
        self.query_rows = UvaBackedTensor(max_num_requests, dtype=torch.int32)
        self.query_rows.np.fill(_NOT_RECORDED)
        self.seq_lens = torch.zeros(max_num_requests, dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.is_real = False


class LeftPages:
    """Which pages left in one step, on its way from the device to the host."""

    def __init__(self, evictions: Sequence[PageCompaction], left: Sequence[torch.Tensor]) -> None:
        """Starts the copy, behind what computes `left`: for each eviction int32 ids on the device."""
        self._evictions = list(evictions)
        self._counts = [ids.shape[0] for ids in left]
        on_device = torch.cat(list(left))
        self._ids = torch.empty_like(on_device, device="cpu", pin_memory=True)
        self._ids.copy_(on_device, non_blocking=True)
        self._copied = torch.cuda.Event(blocking=True)
        self._copied.record()

    def reports(self) -> list[PageReport]:
        """Waits for the copy."""
        self._copied.synchronize()
        by_eviction = zip(self._evictions, self._ids.split(self._counts), strict=True)
        return [PageReport(e.request_id, e.eviction_id, tuple(ids.tolist())) for e, ids in by_eviction]


class ReportingOutput(AsyncModelRunnerOutput):
    """A step's output, which vLLM asks for when it needs it, with the reports of which pages left."""

    def __init__(
        self, model_output: AsyncModelRunnerOutput | ModelRunnerOutput, left: Sequence[LeftPages]
    ) -> None:
        self._model_output = model_output
        self._left = left

    def get_output(self) -> ModelRunnerOutput:
        output = self._model_output
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        return with_reports(output, [report for left in self._left for report in left.reports()])


class CompactingRunnerV2(GPUModelRunner):
    """Model Runner V2 with compaction."""

    _lengths: PhysicalLengths
    _query_window: GpuQueryWindow
    _compactor: GpuCompactor
    _rkv_layers: list[Attention]
    _left_pages: list[LeftPages]

    # -- set-up --------------------------------------------------------------------------------------------

    def watch_queries(self, layers: list[Attention]) -> None:
        """To be called once, when the model is loaded and before memory is profiled."""
        vllm_config: VllmConfig = self.vllm_config
        num_rows = num_query_rows(vllm_config.scheduler_config.max_num_seqs)
        self._rkv_layers = layers
        self._left_pages = []
        self._query_window = GpuQueryWindow(layers, num_rows, self.max_num_tokens, self.device)
        self._lengths = PhysicalLengths(self.max_num_reqs, self.max_num_tokens, self.device)
        _make_physical(self.model_state, self._lengths, self._query_window)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:  # a cache for the moment
            return
        config = RkvConfig.from_additional_config(self.vllm_config.additional_config)
        caches = [layer.kv_cache for layer in self._rkv_layers]
        if caches[0].shape[0] != kv_cache_config.num_blocks:
            raise ValueError(
                f"attention splits vLLM's {kv_cache_config.num_blocks} pages into {caches[0].shape[0]}; "
                f"choose a --block-size that {type(self._rkv_layers[0].impl).__name__} takes as it is"
            )
        self._compactor = GpuCompactor(
            caches,
            self._query_window.queries,
            self._rkv_layers[0].impl.scale,
            config,
            make_policies(config),
        )

    def warm_up_compaction(self) -> None:
        """Compiles the kernels, which would otherwise stall the first request that is due."""
        self._compactor.warm_up()
        self._query_window.warm_up()

    def capture_model(self, *, profile_only: bool = False) -> int:
        num_bytes: int = super().capture_model(profile_only=profile_only)
        # Ranks that time their graphs apart could choose different ones.
        alone = self.vllm_config.parallel_config.world_size_across_dp == 1
        if alone and not profile_only and self.cudagraph_manager is not None:
            prefer_fastest(self.cudagraph_manager)
        return num_bytes

    # -- a step --------------------------------------------------------------------------------------------

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        # New requests and resumed ones alike start with all their tokens.
        for request in scheduler_output.scheduled_new_reqs:
            self._lengths.evicted.np[self.req_states.req_id_to_index[request.req_id]] = 0

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        plan, lengths, slot_of = plan_of(scheduler_output), self._lengths, self.req_states.req_id_to_index
        # Before vLLM writes anything: a page freed by this plan may have a new owner in this very step.
        compactions = [c for c in plan.rounds if isinstance(c, TokenCompaction)]
        evictions = [e for e in plan.rounds if isinstance(e, PageCompaction)]
        self._compactor.run(compactions)
        for compaction in compactions:
            slot = slot_of[compaction.request_id]
            lengths.evicted.np[slot] = compaction.evicted
            self.block_tables.append_block_ids(slot, (list(compaction.target_pages),), overwrite=True)
        if evictions:
            with self._compactor.stopwatch.timed():
                self._drop_pages(evictions)
        self._query_window.active = bool(plan.recordings)
        lengths.query_rows.np.fill(_NOT_RECORDED)
        for request_id, row in plan.recordings.items():
            lengths.query_rows.np[slot_of[request_id]] = row
        lengths.evicted.copy_to_uva()
        lengths.query_rows.copy_to_uva()
        super().update_requests(scheduler_output)

    def _drop_pages(self, evictions: Sequence[PageCompaction]) -> None:
        """Rewrites the rows of the block table on the device; how many pages stay follows from counts."""
        slots = [self.req_states.req_id_to_index[eviction.request_id] for eviction in evictions]
        (table,) = self.block_tables.block_tables
        (page_size,) = self.block_tables.block_sizes
        left = self._compactor.evict_pages(evictions, [table.gpu[slot] for slot in slots])
        for eviction, slot in zip(evictions, slots, strict=True):
            self._lengths.evicted.np[slot] = eviction.evicted
            # Where vLLM appends this step's pages.
            self.block_tables.num_blocks.np[0, slot] = cdiv(eviction.keep, page_size)
        self._left_pages.append(LeftPages(evictions, left))

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        return self._report(super().execute_model(*args, **kwargs))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output, durations = super().sample_tokens(*args, **kwargs), self._compactor.stopwatch.take()
        step = output.model_runner_output if isinstance(output, AsyncOutput) else output
        if isinstance(step, ModelRunnerOutput) and step.req_ids:  # not vLLM's one empty output for all
            attach_durations(step, durations)
        return self._report(output)

    def _report(self, model_output: Any) -> Any:
        """Sends along which pages left, with the step's output; None stands for one still to come."""
        if not self._left_pages or not isinstance(model_output, AsyncModelRunnerOutput | ModelRunnerOutput):
            return model_output
        left, self._left_pages = self._left_pages, []
        return ReportingOutput(model_output, left)

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        lengths = self._lengths
        prepare_physical(
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            input_batch.seq_lens,
            lengths.evicted.gpu,
            lengths.query_rows.gpu,
            physical_seq_lens=lengths.seq_lens,
            physical_positions=lengths.positions,
            places=self._query_window.places,
            window=WINDOW,
        )
        lengths.is_real = True
        num_tokens = input_batch.positions.shape[0]
        return super().prepare_attn(
            dataclasses.replace(input_batch, positions=lengths.positions[:num_tokens])
        )


def _make_physical(model_state: ModelState, lengths: PhysicalLengths, window: GpuQueryWindow) -> None:
    """Makes the model's attention metadata physical; the batch itself stays logical for everything else.

    vLLM picks the class of `model_state` by model and has no hook on its way to attention, so that the
    instance is re-typed.
    """
    state_class = type(model_state)

    def prepare_attn(state: Any, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        count = input_batch.seq_lens.shape[0]
        upper_bound = input_batch.seq_lens_cpu_upper_bound
        if lengths.is_real:
            lengths.is_real = False
            upper_bound = upper_bound.clone()
            upper_bound[: input_batch.num_reqs] -= torch.from_numpy(
                lengths.evicted.np[input_batch.idx_mapping_np[: input_batch.num_reqs]]
            )
        else:
            lengths.seq_lens[:count].copy_(input_batch.seq_lens)
            window.places.fill_(_NOT_RECORDED)
        physical = dataclasses.replace(
            input_batch, seq_lens=lengths.seq_lens[:count], seq_lens_cpu_upper_bound=upper_bound
        )
        return state_class.prepare_attn(state, physical, *args, **kwargs)

    model_state.__class__ = type(
        f"Physical{state_class.__name__}", (state_class,), {"prepare_attn": prepare_attn}
    )
