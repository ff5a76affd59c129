"""vLLM's workers with compaction."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker

from rkv_vllm.block_manager import register_compacting_spec, to_compacting_specs
from rkv_vllm.compatibility import refuse_unsupported, refuse_unsupported_layers
from rkv_vllm.runner_v1 import CompactingRunnerMixin


class CompactingCpuWorker(CPUWorker):
    """For vLLM's CPU build, which runs the V1 model runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(self.vllm_config)
        register_compacting_spec()

    def init_device(self) -> None:
        super().init_device()
        runner_class = type(self.model_runner)
        self.model_runner.__class__ = type(
            f"Compacting{runner_class.__name__}", (CompactingRunnerMixin, runner_class), {}
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        layers = {
            name: layer
            for name, layer in self.vllm_config.compilation_config.static_forward_context.items()
            if isinstance(layer, Attention)
        }
        refuse_unsupported_layers(layers)
        self.model_runner.watch_queries(list(layers.values()))

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return to_compacting_specs(super().get_kv_cache_spec())
