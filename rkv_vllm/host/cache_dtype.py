"""vLLM's names of what a KV cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Caches that hold keys and values as they are.
PLAIN = ("auto", "float16", "bfloat16")
#: Caches that hold them in FP8 with four bits of exponent.
E4M3 = ("fp8", "fp8_e4m3")
#: Caches that hold them in FP8, over a scale of the layer or of the KV head.
FP8 = (*E4M3, "fp8_e5m2")


def cache_dtype(vllm_config: VllmConfig) -> str:
    """What the cache will hold; "auto" stands for the model's dtype.

    A checkpoint of compressed-tensors may ask for FP8. vLLM's own setting still says "auto" then: each layer
    decides when it is made, in the worker.
    """
    asked, checkpoint = vllm_config.cache_config.cache_dtype, vllm_config.quant_config
    if asked == "auto" and checkpoint is not None and checkpoint.get_name() == "compressed-tensors":
        from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

        assert isinstance(checkpoint, compressed_tensors.CompressedTensorsConfig)
        return asked if checkpoint.kv_cache_scheme is None else "fp8"
    return asked


def device_problem(dtype: str) -> str | None:
    """Why kernels cannot read a cache of this type on this GPU, one line; None where they can."""
    from vllm.platforms import current_platform

    if dtype not in E4M3 or not current_platform.is_cuda():
        return None
    if current_platform.has_device_capability(89):
        return None
    return (
        "an FP8 KV cache is not supported on a GPU before compute capability 8.9; --kv-cache-dtype bfloat16"
    )
