"""Adapter for vLLM's Model Runner V2: physical lengths for attention, logical ones for all else.

CUDA graphs bake addresses, not contents. What attention reads (sequence lengths, slot mapping, indices into
the query ring) therefore lives in buffers of fixed address, which are filled anew before each step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from rkv_vllm.decisions.messages import (
    attach_durations,
    plan_of,
)
from rkv_vllm.decisions.query_rows import num_query_rows
from rkv_vllm.execution.attention_groups import make_physical
from rkv_vllm.execution.compactor import GroupCompactors
from rkv_vllm.execution.gpu.compactor import GpuCompactor, GpuTables, make_gpu_compactor
from rkv_vllm.execution.gpu.graph_choice import prefer_fastest
from rkv_vllm.execution.gpu.group_table import GpuGroupTable
from rkv_vllm.execution.gpu.page_reports import EvictedPageIds, ReportingOutput
from rkv_vllm.execution.gpu.physical_lengths import NOT_CAPTURED, PhysicalLengths, tell_batches
from rkv_vllm.execution.gpu.query_ring import GpuQueryRing
from rkv_vllm.execution.kv_head_copies import ranks_per_kv_head
from rkv_vllm.execution.layer_groups import LayerGroup, layer_groups
from rkv_vllm.execution.logit_factors import LogitFactors
from rkv_vllm.execution.rotary import rotary_pairs
from rkv_vllm.execution.stopwatch import CudaStopwatch
from rkv_vllm.execution.stored_types import typed_cache
from rkv_vllm.host.kv_cache_spec import to_compacting_specs
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.kernels.step_inputs import prepare_physical
from rkv_vllm.policies import make_policies
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.policy_table import RING_SIZE


class CompactingRunnerV2(GPUModelRunner):
    """Model Runner V2 with compaction."""

    _lengths: PhysicalLengths
    _query_ring: GpuQueryRing
    _groups: list[LayerGroup]
    _compactors: GroupCompactors[Any, GpuTables, EvictedPageIds]
    #: int64 [KV cache groups, max tokens]; None: all groups are compacted
    _physical_slots: torch.Tensor | None = None
    _rkv_layers: list[Attention]
    _rotary_pairs: RotaryPairs

    # -- set-up --------------------------------------------------------------------------------------------

    def install_query_capture(self, layers: list[Attention]) -> None:
        """To be called once, when the model is loaded and before memory is profiled."""
        vllm_config: VllmConfig = self.vllm_config
        num_rows = num_query_rows(vllm_config.scheduler_config.max_num_seqs)
        self._rkv_layers = layers
        self._rotary_pairs = rotary_pairs(self.model, layers)
        self._query_ring = GpuQueryRing(
            layers, num_rows, self.device, ranks_per_kv_head(vllm_config), self.max_num_tokens
        )
        self._lengths = PhysicalLengths(self.max_num_reqs, self.max_num_tokens, self.device)
        tell_batches(self.model_state, self._lengths, self._query_ring)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:  # a cache for the moment
            return
        self._groups = layer_groups(kv_cache_config, self._rkv_layers)
        self._query_ring.put_together([group.layers for group in self._groups])
        compactors: list[tuple[GpuCompactor[Any], GpuTables]] = []
        for group in self._groups:
            make_physical(self.attn_groups[group.group_id], self._lengths.physical)
            tables = GpuGroupTable(self.block_tables, self.req_states.req_id_to_index, group.group_id)
            compactors.append((self._make_compactor(group, kv_cache_config.num_blocks), tables))
        self._compactors = GroupCompactors(compactors, CudaStopwatch())
        if len(self._groups) < len(kv_cache_config.kv_cache_groups):
            self._physical_slots = torch.empty_like(self.block_tables.slot_mappings)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return to_compacting_specs(super().get_kv_cache_spec())

    def _make_compactor(self, group: LayerGroup, num_pages: int) -> GpuCompactor[Any]:
        config = RkvConfig.from_additional_config(self.vllm_config.additional_config)
        layers = [self._rkv_layers[layer] for layer in group.layers]
        caches = [typed_cache(layer) for layer in layers]
        if caches[0].shape[0] != num_pages:
            raise ValueError(
                f"attention splits vLLM's {num_pages} pages into {caches[0].shape[0]}: "
                f"choose a --block-size that {type(layers[0].impl).__name__} does not split"
            )
        return make_gpu_compactor(
            caches,
            self._query_ring.of_layers(group.layers),
            LogitFactors(layers, self.device),
            config,
            make_policies(config),
            group=group,
            pairs=self._rotary_pairs,
            longest=min(self.max_model_len, num_pages * caches[0].shape[2]),
            ranks_per_kv_head=self._query_ring.ranks_per_kv_head,
        )

    def warm_up_compaction(self) -> None:
        """Compiles the kernels, which would otherwise stall the first request that is due."""
        self._compactors.warm_up()
        self._query_ring.warm_up()

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
        self._compactors.run(plan.rounds)
        for compaction in plan.rounds:
            lengths.evicted.np[slot_of[compaction.request_id]] = compaction.evicted
        self._query_ring.active = bool(plan.captures)
        lengths.query_rows.np.fill(NOT_CAPTURED)
        for request_id, row in plan.captures.items():
            lengths.query_rows.np[slot_of[request_id]] = row
        lengths.evicted.copy_to_uva()
        lengths.query_rows.copy_to_uva()
        super().update_requests(scheduler_output)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        return self._report(super().execute_model(*args, **kwargs))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output, durations = super().sample_tokens(*args, **kwargs), self._compactors.stopwatch.take()
        step = output.model_runner_output if isinstance(output, AsyncOutput) else output
        if isinstance(step, ModelRunnerOutput) and step.req_ids:  # not vLLM's one empty output for all
            attach_durations(step, durations)
        return self._report(output)

    def _report(self, model_output: Any) -> Any:
        """Sends along which pages were evicted, with the step's output; None stands for one still to come."""
        if not isinstance(model_output, AsyncModelRunnerOutput | ModelRunnerOutput):
            return model_output
        evicted = self._compactors.take_evicted()
        return ReportingOutput(model_output, evicted) if evicted else model_output

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
            ring_indices=self._query_ring.ring_indices,
            ring_size=RING_SIZE,
        )
        lengths.is_real = True
        physical = lengths.positions[: input_batch.positions.shape[0]]
        if self._physical_slots is None:
            return super().prepare_attn(dataclasses.replace(input_batch, positions=physical))
        tables, slots = super().prepare_attn(input_batch)
        of_compacted = self.block_tables.compute_slot_mappings(
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            physical,
            input_batch.num_tokens_after_padding,
            out=self._physical_slots,
        )
        for group in self._groups:
            slots[group.group_id].copy_(of_compacted[group.group_id])
        return tables, slots
