"""Adapter for vLLM's V1 model runner: physical lengths for attention, logical ones for all else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from rkv_vllm.decisions.messages import (
    CompactionPlan,
    PageReport,
    attach_durations,
    plan_of,
    with_reports,
)
from rkv_vllm.decisions.query_rows import num_query_rows
from rkv_vllm.execution.attention_groups import make_physical, with_lengths
from rkv_vllm.execution.compactor import GroupCompactors
from rkv_vllm.execution.cpu.compactor import CpuTables, make_cpu_compactor
from rkv_vllm.execution.cpu.generator import RewindableGenerator
from rkv_vllm.execution.cpu.group_table import CpuGroupTable
from rkv_vllm.execution.cpu.layer_cache import CpuLayerCache
from rkv_vllm.execution.cpu.query_ring import CpuQueryRing, captured_positions
from rkv_vllm.execution.kv_head_copies import ranks_per_kv_head
from rkv_vllm.execution.layer_groups import LayerGroup, layer_groups
from rkv_vllm.execution.rotary import rotary_pairs
from rkv_vllm.execution.stopwatch import CpuStopwatch
from rkv_vllm.host.kv_cache_spec import to_compacting_specs
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import make_policies
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.policy_table import RING_SIZE


class CompactingCpuRunner(CPUModelRunner):
    """The V1 runner of vLLM's CPU build with compaction.

    `_evicted` maps a compacted request to its evicted tokens. All of vLLM's own state stays logical; what
    attention of compacted layers reads of it (sequence lengths, slot mapping, block table) is physical.
    """

    _evicted: dict[str, int]
    _evicted_of_batch: torch.Tensor | None = None  # int32 [requests]; None: nothing left any of them
    _query_ring: CpuQueryRing
    _groups: list[LayerGroup]
    _compactors: GroupCompactors[Any, CpuTables, PageReport]
    _rkv_layers: list[Attention]
    _rotary_pairs: RotaryPairs

    def install_query_capture(self, layers: list[Attention]) -> None:
        """To be called once, when the model is loaded and before memory is profiled."""
        vllm_config: VllmConfig = self.vllm_config
        num_rows = num_query_rows(vllm_config.scheduler_config.max_num_seqs)
        self._evicted = {}
        self._rkv_layers = layers
        self._rotary_pairs = rotary_pairs(self.model, layers)
        self._query_ring = CpuQueryRing(layers, num_rows, self.device, ranks_per_kv_head(vllm_config))

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:  # a cache for the moment
            return
        self._groups = layer_groups(kv_cache_config, self._rkv_layers)
        config = RkvConfig.from_additional_config(self.vllm_config.additional_config)
        policies = make_policies(config)
        compactors = []
        for group in self._groups:
            make_physical(self.attn_groups[group.group_id], self._physical)
            caches = [CpuLayerCache(self._rkv_layers[layer]) for layer in group.layers]
            compactor = make_cpu_compactor(
                caches, self._query_ring, config, policies, self._rotary_pairs, group
            )
            tables = CpuGroupTable(self.requests, self.input_batch, group.group_id)
            compactors.append((compactor, tables))
        self._compactors = GroupCompactors(compactors, CpuStopwatch())

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return to_compacting_specs(super().get_kv_cache_spec())

    # -- a step --------------------------------------------------------------------------------------------

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        plan = plan_of(scheduler_output)
        # Before vLLM writes anything: a page freed by this plan may have a new owner in this very step.
        self._compactors.run(plan.rounds)
        gone = (
            *scheduler_output.finished_req_ids,
            *(request.req_id for request in scheduler_output.scheduled_new_reqs),
            *scheduler_output.scheduled_cached_reqs.resumed_req_ids,
        )
        for request_id in gone:
            self._evicted.pop(request_id, None)
        for compaction in plan.rounds:
            self._evicted[compaction.request_id] = compaction.evicted
        updated = super()._update_states(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self._make_rewindable(request.req_id)
        return updated

    def _make_rewindable(self, request_id: str) -> None:
        state = self.requests[request_id]
        if state.generator is not None:
            generator = RewindableGenerator()
            generator.set_state(state.generator.get_state())
            state.generator = generator
            self.input_batch.generators[self.input_batch.req_id_to_index[request_id]] = generator

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        output = super().execute_model(*args, **kwargs)
        self._query_ring.end_step()
        self._evicted_of_batch = None  # what else may run before the next step is a dummy batch
        return self._report(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        for generator in self.input_batch.generators.values():
            generator.remember()
        output, durations = super().sample_tokens(*args, **kwargs), self._compactors.stopwatch.take()
        if isinstance(output, ModelRunnerOutput) and output.req_ids:  # not vLLM's one empty output for all
            attach_durations(output, durations)
        return self._report(output)

    def _report(self, model_output: Any) -> Any:
        """Sends along which pages were evicted, with the step's output; None stands for one still to come."""
        if model_output is None:
            return None
        reports = self._compactors.take_evicted()
        return with_reports(model_output, reports) if reports else model_output

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._set_captures(plan_of(scheduler_output), num_scheduled_tokens)
        evicted = [self._evicted.get(request_id, 0) for request_id in self.input_batch.req_ids]
        self._evicted_of_batch = torch.tensor(evicted, dtype=torch.int32) if any(evicted) else None
        if self._evicted_of_batch is not None:
            self._map_slots(self._evicted_of_batch, num_scheduled_tokens)
        return prepared

    def _map_slots(self, evicted: torch.Tensor, num_scheduled_tokens: np.ndarray) -> None:
        """Says anew where the step's tokens go in compacted layers; vLLM goes by positions in the text."""
        num_requests, num_tokens = len(evicted), int(num_scheduled_tokens.sum())
        by_token = evicted.repeat_interleave(torch.from_numpy(num_scheduled_tokens))
        slots = self.positions[:num_tokens] - by_token
        for group in self._groups:
            self.input_batch.block_table[group.group_id].compute_slot_mapping(
                num_requests, self.query_start_loc.gpu[: num_requests + 1], slots
            )

    def _physical(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        evicted = self._evicted_of_batch
        if evicted is None:
            return common
        behind = common.num_reqs - len(evicted)  # rows that vLLM pads the batch with
        evicted = torch.nn.functional.pad(evicted, (0, behind))
        return with_lengths(common, common.seq_lens - evicted, common.seq_lens_cpu_upper_bound - evicted)

    def _set_captures(self, plan: CompactionPlan, num_scheduled_tokens: np.ndarray) -> None:
        tokens: list[int] = []
        ring_indices: list[int] = []
        for request_id, query_row in plan.captures.items():
            row = self.input_batch.req_id_to_index[request_id]
            first, count = self.input_batch.num_computed_tokens_cpu[row], num_scheduled_tokens[row]
            batch_start = self.query_start_loc.np[row]
            for position in captured_positions(int(first), int(count)):
                tokens.append(int(batch_start) + position - int(first))
                ring_indices.append(query_row * RING_SIZE + position % RING_SIZE)
        self._query_ring.begin_step(tokens, ring_indices)
