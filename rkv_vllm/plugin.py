"""Entry point of `vllm.general_plugins`, which vLLM calls once in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Makes the KV cache spec known wherever vLLM holds specs, before anything unpickles or groups one, and
    has processes that fail to start say why, and the results of several answers to a request added up."""
    from rkv_vllm.host.answer_sums import install
    from rkv_vllm.host.start_failure import report_failure
    from rkv_vllm.scheduling.block_manager import register_compacting_spec

    register_compacting_spec()
    report_failure()
    install()
