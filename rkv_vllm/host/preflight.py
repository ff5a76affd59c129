"""What can be known to be wrong before an engine is started; `rkv-vllm doctor` and `serve` share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from rkv_vllm.host.cache_dtype import FP8, cache_dtype, device_problem
from rkv_vllm.host.compatibility import unsupported_features, wrong_runner
from rkv_vllm.host.contract import CONTRACT, CONTRACT_V1_RUNNER, CONTRACT_V2_RUNNER, contract_problems
from rkv_vllm.host.pool import page_size, pool_problems
from rkv_vllm.settings.error_text import explain

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs


def engine_config(arguments: AsyncEngineArgs, *, headless: bool = False) -> VllmConfig:
    """The configuration that a server with these arguments makes. vLLM keeps what it found out about the
    model: to make a second one takes some milliseconds.

    Raises: ValueError, one message that names the option, where vLLM cannot make one.
    """
    from vllm.usage.usage_lib import UsageContext

    try:
        return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER, headless=headless)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    except OSError as error:  # no such model
        raise ValueError(f"model: {error}") from None


def installation_problems() -> list[str]:
    """What is wrong with the installed vLLM, one line each."""
    from vllm.platforms import current_platform

    runner = CONTRACT_V1_RUNNER if current_platform.is_cpu() else CONTRACT_V2_RUNNER
    return contract_problems(CONTRACT, runner)


def start_problems(vllm_config: VllmConfig) -> list[str]:
    """Why an engine of this configuration would not start, one line each; empty where nothing speaks against
    it. No weights are loaded.

    Args:
        vllm_config: complete, with rkv-vllm's settings in its `additional_config`.
    """
    from vllm.platforms import current_platform

    refused = unsupported_features(vllm_config)
    # What a refused model needs of pages and backends is of no use to anybody.
    return [
        *(
            refused
            or [*fp8_problems(vllm_config), *page_size_problems(vllm_config), *pool_problems(vllm_config)]
        ),
        *wrong_runner(vllm_config, current_platform.is_cpu()),
        *installation_problems(),
    ]


def fp8_problems(vllm_config: VllmConfig) -> list[str]:
    """What the device says of an FP8 cache, one line; vLLM finds it out when the weights are loaded."""
    from vllm.platforms import current_platform

    dtype = cache_dtype(vllm_config)
    if dtype not in FP8:
        return []
    if problem := device_problem(dtype):
        return [problem]
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        model = vllm_config.model_config
        try:
            _get_attn_isa(model.dtype, page_size(vllm_config), model.get_head_size(), dtype)
        except NotImplementedError as error:
            return [f"--kv-cache-dtype {dtype}: {error}"]
    return []


def page_size_problems(vllm_config: VllmConfig) -> list[str]:
    """What the attention backend says of a page size that was chosen; vLLM asks it only when the weights are
    loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.worker.utils import select_common_block_size

    model, cache = vllm_config.model_config, vllm_config.cache_config
    if not cache.user_specified_block_size:
        return []
    try:
        with set_current_vllm_config(vllm_config):
            backend = get_attn_backend(model.get_head_size(), model.dtype, cache_dtype(vllm_config))
    except ValueError as error:
        return [f"--block-size {cache.block_size}: {error}"]
    try:
        select_common_block_size(cache.block_size, [backend])
    except ValueError:
        takes = " or ".join(
            f"multiples of {size.base}" if isinstance(size, MultipleOf) else str(size)
            for size in backend.get_supported_kernel_block_sizes()
        )
        name = backend.get_name()
        return [f"--block-size {cache.block_size} does not suit the attention backend: {name} takes {takes}"]
    return []
