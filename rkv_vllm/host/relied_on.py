"""What the engine core relies on in vLLM: the scheduler, the block manager, and what travels with outputs."""

from __future__ import annotations

from rkv_vllm.host.releases import Contract, attributes

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
    "vllm.v1.core.kv_cache_manager.KVCacheManager.create_kv_cache_blocks": ("blocks",),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.cache_blocks": ("request", "num_computed_tokens"),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.find_longest_cache_hit": (
        "block_hashes",
        "max_cache_hit_length",
    ),
    # What layers with windows hold.
    "vllm.v1.core.single_type_kv_cache_manager.SlidingWindowManager.get_num_skipped_tokens": (
        "num_computed_tokens",
    ),
    "vllm.v1.core.single_type_kv_cache_manager.ChunkedLocalAttentionManager.get_num_skipped_tokens": (
        "num_computed_tokens",
    ),
    "vllm.v1.kv_cache_interface.SlidingWindowSpec.max_admission_blocks_per_request": (
        "max_in_flight_tokens",
        "max_model_len",
    ),
    "vllm.v1.kv_cache_interface.ChunkedLocalAttentionSpec.max_admission_blocks_per_request": (
        "max_in_flight_tokens",
        "max_model_len",
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
_CORE_ATTRIBUTES = attributes(
    {
        "core.kv_cache_manager.KVCacheManager": "block_pool coordinator kv_cache_config watermark_blocks",
        "kv_cache_interface.KVCacheConfig": "kv_cache_groups",
        "kv_cache_interface.KVCacheGroupSpec": "kv_cache_spec layer_names",
        "kv_cache_interface.UniformTypeKVCacheSpecs": "kv_cache_specs",
        "core.kv_cache_coordinator.KVCacheCoordinator": "single_type_managers",
        "core.single_type_kv_cache_manager.FullAttentionManager": (
            "block_pool block_size kv_cache_group_id num_cached_block req_to_blocks"
        ),
        "core.block_pool.BlockPool": "num_gpu_blocks",
        "core.kv_cache_utils.KVCacheBlock": "block_id is_null ref_cnt",
        "core.sched.scheduler.Scheduler": (
            "kv_cache_manager num_spec_tokens prev_step_scheduled_req_ids requests running vllm_config "
            "waiting"
        ),
        "core.sched.output.SchedulerOutput": (
            "finished_req_ids num_scheduled_tokens preempted_req_ids scheduled_cached_reqs scheduled_new_reqs"
        ),
        "core.sched.output.NewRequestData": "req_id",
        "core.sched.output.CachedRequestData": "resumed_req_ids",
        "request.Request": (
            "block_hashes client_index max_tokens num_computed_tokens num_in_flight_tokens num_output_tokens "
            "num_prompt_tokens num_stale_output_tokens num_tokens request_id resumable sampling_params status"
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
CONTRACT: Contract = {**_CORE_METHODS, **_CORE_SUBCLASSES, **_CORE_ATTRIBUTES}
