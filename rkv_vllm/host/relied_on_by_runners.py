"""What the workers rely on in vLLM: the model runners, and the attention layers of a model."""

from __future__ import annotations

from rkv_vllm.host.releases import Contract, attributes

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
    "vllm.v1.worker.block_table.BlockTable.add_row": ("block_ids", "row_idx"),
    "vllm.v1.worker.block_table.MultiGroupBlockTable.__getitem__": ("idx",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.get_kv_cache_spec": (),
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
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.get_kv_cache_spec": (),
    "vllm.v1.worker.gpu.block_table.BlockTables.compute_slot_mappings": (
        "idx_mapping",
        "query_start_loc",
        "positions",
        "num_tokens_padded",
        "out",
    ),
    "vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor.stage_write": ("index", "start", "x"),
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

#: What a subclass of ours has to define.
_V2_RUNNER_SUBCLASSES: Contract = {
    "vllm.v1.outputs.AsyncModelRunnerOutput": {
        "0.32.0": frozenset({"get_output"}),
        "0.33.0": frozenset({"get_output", "get_kv_connector_output"}),
    },
}

_V1_RUNNER_ATTRIBUTES = attributes(
    {
        "worker.cpu_model_runner.CPUModelRunner": (
            "attn_groups device input_batch positions query_start_loc requests vllm_config"
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
_V2_RUNNER_ATTRIBUTES = attributes(
    {
        "worker.gpu_worker.Worker": "device model_runner use_v2_model_runner vllm_config",
        "worker.gpu.model_runner.GPUModelRunner": (
            "attn_groups block_tables cudagraph_manager device max_num_reqs max_num_tokens model_state "
            "req_states vllm_config"
        ),
        "worker.gpu.states.RequestState": "req_id_to_index",
        "worker.gpu.block_table.BlockTables": "block_sizes block_tables num_blocks slot_mappings",
        "worker.gpu.buffer_utils.UvaBackedTensor": "gpu np",
        "worker.gpu.buffer_utils.StagedWriteTensor": "gpu",
        "worker.gpu.input_batch.InputBatch": (
            "idx_mapping idx_mapping_np num_reqs num_tokens_after_padding positions query_start_loc seq_lens "
            "seq_lens_cpu_upper_bound"
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
#: Of a model's attention layers and what is built for them, whichever runner it has.
_LAYER_METHODS: Contract = {
    "vllm.v1.worker.utils.AttentionGroup.build_metadata": (
        "common_attn_metadata",
        "ubatch_idx",
        "common_prefix_len",
        "kwargs",
    ),
    "vllm.v1.worker.utils.AttentionGroup.build_metadata_for_cudagraph_capture": (
        "common_attn_metadata",
        "ubatch_idx",
    ),
    "vllm.v1.attention.backend.CommonAttentionMetadata.replace": ("kwargs",),
    "vllm.model_executor.layers.attention.Attention.get_kv_cache_spec": ("vllm_config",),
}
_LAYER = "vllm.model_executor.layers.attention.Attention"
_LAYER_ATTRIBUTES: Contract = {
    f"{_LAYER}.{name}": None
    for name in (
        *("attn_backend", "attn_type", "dtype", "head_size", "impl", "kv_cache", "kv_cache_dtype"),
        *("kv_sharing_target_layer_name", "layer_name", "num_heads", "num_kv_heads", "query_quant"),
    )
}
_METADATA_ATTRIBUTES = attributes(
    {
        "attention.backend.CommonAttentionMetadata": (
            "_num_computed_tokens_cache max_seq_len num_reqs seq_lens seq_lens_cpu_upper_bound"
        )
    }
)

CONTRACT_LAYERS: Contract = {**_LAYER_METHODS, **_LAYER_ATTRIBUTES, **_METADATA_ATTRIBUTES}
CONTRACT_V1_RUNNER: Contract = {**_V1_RUNNER_METHODS, **_V1_RUNNER_ATTRIBUTES, **CONTRACT_LAYERS}
CONTRACT_V2_RUNNER: Contract = {
    **_V2_RUNNER_METHODS,
    **_V2_RUNNER_SUBCLASSES,
    **_V2_RUNNER_ATTRIBUTES,
    **CONTRACT_LAYERS,
}
