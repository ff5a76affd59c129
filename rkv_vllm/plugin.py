"""Entry point of `vllm.general_plugins`, which vLLM calls once in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Makes the KV cache spec known wherever vLLM holds specs, before anything unpickles or groups one."""
    from rkv_vllm.scheduling.block_manager import register_compacting_spec

    register_compacting_spec()
