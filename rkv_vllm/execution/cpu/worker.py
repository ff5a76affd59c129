"""vLLM's CPU worker with compaction."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from rkv_vllm import plugin
from rkv_vllm.execution.cpu.runner import CompactingCpuRunner
from rkv_vllm.execution.layer_groups import compacted_layers
from rkv_vllm.host.compatibility import NEEDS_V1_RUNNER, refuse_unsupported
from rkv_vllm.host.contract import CONTRACT_V1_RUNNER
from rkv_vllm.host.process_end import skip_last_collections_of_engine
from rkv_vllm.host.request_validator import without_validator
from rkv_vllm.host.retype import retype


class CompactingCpuWorker(CPUWorker):
    """For vLLM's CPU build, which runs the V1 model runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(self.vllm_config, CONTRACT_V1_RUNNER)
        plugin.register()
        skip_last_collections_of_engine()

    def init_device(self) -> None:
        with without_validator(self.vllm_config.model_config):
            super().init_device()
        if type(self.model_runner) is not CPUModelRunner:
            raise ValueError(NEEDS_V1_RUNNER)
        # vLLM has no factory for its CPU runner.
        retype(self.model_runner, CompactingCpuRunner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.install_query_capture(compacted_layers(self.vllm_config))
