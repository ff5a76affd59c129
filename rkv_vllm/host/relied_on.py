"""What rkv-vllm relies on in vLLM: methods with their parameters, attributes, and what subclasses define."""

from __future__ import annotations

from collections.abc import Mapping

#: The releases this was written and tested against, the oldest first.
SUPPORTED = ("0.32.0", "0.33.0")

#: A method's parameters in order, `self` left out; a set: of an abstract class, the methods that a subclass
#: has to define; None: an attribute of instances.
Expected = tuple[str, ...] | frozenset[str] | None
#: Where something lives -> what is expected there. What releases differ in is said by the first of each kind.
Contract = Mapping[str, Expected | Mapping[str, Expected]]


def _attributes(by_class: Mapping[str, str]) -> Contract:
    """Of names separated by spaces, by class."""
    return {f"vllm.v1.{where}.{name}": None for where, names in by_class.items() for name in names.split()}


#: What the scheduler and the block manager rely on.
_CORE_METHODS: Contract = {
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager.get_num_blocks_to_allocate": (
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    ),
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager.allocate_new_blocks": (
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ),
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager.cache_blocks": (
        "request",
        "num_tokens",
        "retention_interval",
        "replay_boundaries",
    ),
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager.pop_blocks_for_free": ("request_id",),
    "vllm.v1.kv_cache_interface.FullAttentionSpec.max_memory_usage_bytes": ("vllm_config",),
    "vllm.v1.core.block_pool.BlockPool.is_block_writable": ("block",),
    "vllm.v1.core.block_pool.BlockPool.get_new_blocks": ("num_blocks",),
    "vllm.v1.core.block_pool.BlockPool.free_blocks": ("ordered_blocks",),
    "vllm.v1.core.block_pool.BlockPool.evict_blocks": ("block_ids",),
    # Sees the results of a request's answers before vLLM keeps one of them.
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs": (
        "engine_core_outputs",
        "engine_core_timestamp",
        "iteration_stats",
        "weight_version",
    ),
    # Leaves `watermark_blocks` free when it admits a request, which admission sets.
    "vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots": (
        "request",
        "num_new_tokens",
        "num_new_computed_tokens",
        "new_computed_blocks",
        "num_lookahead_tokens",
        "num_external_computed_tokens",
        "delay_cache_blocks",
        "num_encoder_tokens",
        "full_sequence_must_fit",
        "reserved_blocks",
        "has_scheduled_reqs",
        "skip_zeroing_group_ids",
    ),
    "vllm.v1.core.kv_cache_manager.KVCacheManager.truncate_computed_blocks": (
        "blocks",
        "num_computed_tokens",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler.schedule": ("throttle_prefills",),
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output": (
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler.add_request": ("request",),
    "vllm.v1.core.sched.scheduler.Scheduler.finish_requests": ("request_ids", "finished_status"),
    "vllm.v1.core.sched.scheduler.Scheduler._preempt_request": (
        "request",
        "timestamp",
        "drop_stale_output",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler._free_request": ("request", "delay_free_blocks"),
    "vllm.v1.core.sched.scheduler.Scheduler._reserve_prefill_lookahead": (
        "request",
        "num_computed_tokens",
        "num_new_tokens",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit": {
        "0.32.0": ("request",),
        "0.33.0": ("request", "max_cache_hit_length"),
    },
    "vllm.v1.core.sched.scheduler.Scheduler.make_stats": (
        "spec_decoding_stats",
        "kv_connector_stats",
        "cudagraph_stats",
        "perf_stats",
        "ec_connector_stats",
    ),
}

#: What a subclass of ours has to define.
_CORE_SUBCLASSES: Contract = {
    "vllm.v1.metrics.loggers.AggregateStatLoggerBase": frozenset(
        {"__init__", "log_engine_initialized", "record"}
    ),
    "vllm.v1.sample.logits_processor.interface.LogitsProcessor": frozenset(
        {"__init__", "apply", "is_argmax_invariant", "update_state"}
    ),
    "vllm.v1.worker.gpu.sample.logits_processor.interface.LogitsProcessor": frozenset({"apply"}),
}
_V2_RUNNER_SUBCLASSES: Contract = {
    "vllm.v1.outputs.AsyncModelRunnerOutput": {
        "0.32.0": frozenset({"get_output"}),
        "0.33.0": frozenset({"get_output", "get_kv_connector_output"}),
    },
}

#: What the adapter of the V1 model runner relies on (CPU).
_V1_RUNNER_METHODS: Contract = {
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states": ("scheduler_output",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model": (
        "scheduler_output",
        "intermediate_tensors",
    ),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.sample_tokens": ("grammar_output",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs": (
        "scheduler_output",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner.initialize_kv_cache": (
        "kv_cache_config",
        "is_profiling",
        "kv_cache_allocation_context",
    ),
    "vllm.v1.worker.block_table.BlockTable.compute_slot_mapping": (
        "num_reqs",
        "query_start_loc",
        "positions",
    ),
    "vllm.v1.worker.block_table.MultiGroupBlockTable.add_row": ("block_ids", "row_idx"),
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward": (
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ),
}

#: What the adapter of Model Runner V2 relies on (GPU).
_V2_RUNNER_METHODS: Contract = {
    "vllm.v1.worker.gpu_worker.Worker._make_model_runner": (),
    "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model": (),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.add_requests": ("scheduler_output",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.update_requests": ("scheduler_output",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_attn": ("input_batch",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model": (
        "scheduler_output",
        "intermediate_tensors",
        "dummy_run",
        "skip_attn_for_dummy_run",
        "is_profile",
        "context_len",
        "valid_dummy_state_slots",
        "randomize_inputs",
    ),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.sample_tokens": ("grammar_output",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache": (
        "kv_cache_config",
        "is_profiling",
        "kv_cache_allocation_context",
    ),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.capture_model": ("profile_only",),
    "vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager.run_fullgraph": ("desc",),
    "vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager.dispatch": (
        "num_reqs",
        "num_tokens",
        "uniform_token_count",
        "num_active_loras",
        "max_query_len",
        "num_ubatches",
    ),
    "vllm.v1.worker.gpu.block_table.BlockTables.append_block_ids": (
        "req_index",
        "new_block_ids",
        "overwrite",
    ),
    "vllm.v1.worker.gpu.model_states.default.DefaultModelState.prepare_attn": (
        "input_batch",
        "cudagraph_mode",
        "block_tables",
        "slot_mappings",
        "attn_groups",
        "kv_cache_config",
        "for_capture",
        "ubatch_idx",
        "model_specific_attn_metadata",
    ),
}

_CORE_ATTRIBUTES = _attributes(
    {
        "core.kv_cache_manager.KVCacheManager": "block_pool coordinator watermark_blocks",
        "core.kv_cache_coordinator.KVCacheCoordinator": "single_type_managers",
        "core.single_type_kv_cache_manager.FullAttentionManager": (
            "block_pool block_size num_cached_block req_to_blocks"
        ),
        "core.block_pool.BlockPool": "num_gpu_blocks",
        "core.kv_cache_utils.KVCacheBlock": "block_id is_null ref_cnt",
        "core.sched.scheduler.Scheduler": (
            "kv_cache_manager prev_step_scheduled_req_ids requests running vllm_config waiting"
        ),
        "core.sched.output.SchedulerOutput": (
            "finished_req_ids num_scheduled_tokens preempted_req_ids scheduled_cached_reqs scheduled_new_reqs"
        ),
        "core.sched.output.NewRequestData": "req_id",
        "core.sched.output.CachedRequestData": "resumed_req_ids",
        "request.Request": (
            "client_index max_tokens num_computed_tokens num_output_tokens num_prompt_tokens num_tokens "
            "request_id resumable sampling_params status"
        ),
        "request.RequestStatus": (
            "FINISHED_ABORTED FINISHED_ERROR FINISHED_REPETITION FINISHED_STOPPED RUNNING"
        ),
        "engine.EngineCoreOutput": "finish_reason kv_transfer_params request_id",
        "engine.EngineCoreOutputs": "outputs",
        "engine.output_processor.OutputProcessor": "request_states",
        "engine.output_processor.RequestState": "parent_req",
    }
)
_V1_RUNNER_ATTRIBUTES = _attributes(
    {
        "worker.cpu_model_runner.CPUModelRunner": (
            "device input_batch optimistic_seq_lens_cpu positions query_start_loc requests seq_lens "
            "vllm_config"
        ),
        "worker.gpu_input_batch.InputBatch": (
            "block_table generators num_computed_tokens_cpu req_id_to_index req_ids"
        ),
        "worker.gpu_input_batch.CachedRequestState": "block_ids generator",
        "utils.CpuGpuBuffer": "gpu np",
        "attention.backends.cpu_attn.CPUAttentionBackendImpl": "alibi_slopes scale",
        "attention.backends.cpu_attn.CPUAttentionMetadataBuilder": "isa",  # which it hands to each layer
        "attention.backend.AttentionLayer": "_k_scale_float",
        "outputs.ModelRunnerOutput": "req_ids",
    }
)
_V2_RUNNER_ATTRIBUTES = _attributes(
    {
        "worker.gpu_worker.Worker": "device model_runner use_v2_model_runner vllm_config",
        "worker.gpu.model_runner.GPUModelRunner": (
            "block_tables cudagraph_manager device max_num_reqs max_num_tokens model_state req_states "
            "vllm_config"
        ),
        "worker.gpu.states.RequestState": "req_id_to_index",
        "worker.gpu.block_table.BlockTables": "block_sizes block_tables num_blocks",
        "worker.gpu.buffer_utils.UvaBackedTensor": "gpu np",
        "worker.gpu.buffer_utils.StagedWriteTensor": "gpu",
        "worker.gpu.input_batch.InputBatch": (
            "idx_mapping idx_mapping_np num_reqs positions query_start_loc seq_lens seq_lens_cpu_upper_bound"
        ),
        "worker.gpu.cudagraph_utils.ModelCudaGraphManager": "graphs",
        "worker.gpu.cudagraph_utils.BatchExecutionDescriptor": (
            "num_active_loras num_tokens num_ubatches uniform_token_count"
        ),
        "worker.gpu.async_utils.AsyncOutput": "model_runner_output",
        "attention.backend.AttentionLayer": "_k_scale _q_scale",
        "outputs.ModelRunnerOutput": "req_ids",
    }
)
#: Of a model's attention layers, whichever runner it has.
_LAYER = "vllm.model_executor.layers.attention.Attention"
_LAYER_ATTRIBUTES: Contract = {
    f"{_LAYER}.{name}": None
    for name in (
        *("attn_backend", "attn_type", "dtype", "head_size", "impl", "kv_cache", "kv_cache_dtype"),
        *("kv_sharing_target_layer_name", "num_heads", "num_kv_heads", "query_quant", "sliding_window"),
    )
}

CONTRACT: Contract = {**_CORE_METHODS, **_CORE_SUBCLASSES, **_CORE_ATTRIBUTES, **_LAYER_ATTRIBUTES}
CONTRACT_V1_RUNNER: Contract = {**_V1_RUNNER_METHODS, **_V1_RUNNER_ATTRIBUTES}
CONTRACT_V2_RUNNER: Contract = {**_V2_RUNNER_METHODS, **_V2_RUNNER_SUBCLASSES, **_V2_RUNNER_ATTRIBUTES}
