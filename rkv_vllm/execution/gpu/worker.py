"""vLLM's GPU worker with compaction."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from rkv_vllm import plugin
from rkv_vllm.execution.gpu.runner import CompactingRunnerV2
from rkv_vllm.execution.layer_groups import compacted_layers
from rkv_vllm.host.compatibility import NEEDS_V2_RUNNER, refuse_unsupported
from rkv_vllm.host.contract import CONTRACT_V2_RUNNER
from rkv_vllm.host.process_end import skip_last_collections_of_engine


class CompactingGpuWorker(Worker):
    """For Model Runner V2, vLLM's default on GPUs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(self.vllm_config, CONTRACT_V2_RUNNER)
        if not self.use_v2_model_runner:
            raise ValueError(NEEDS_V2_RUNNER)
        plugin.register()
        skip_last_collections_of_engine()

    def _make_model_runner(self) -> CompactingRunnerV2:
        return CompactingRunnerV2(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.install_query_capture(compacted_layers(self.vllm_config))

    def compile_or_warm_up_model(self) -> Any:
        self.model_runner.warm_up_compaction()
        return super().compile_or_warm_up_model()
