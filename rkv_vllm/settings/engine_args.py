"""The engine arguments that switch R-KV on in stock vLLM."""

from __future__ import annotations

from typing import Any

from rkv_vllm.settings.config import RkvConfig

SCHEDULER = "rkv_vllm.scheduling.scheduler.make_scheduler"
VALIDATOR = "rkv_vllm.host.request_validator:BudgetValidator"


def rkv_engine_args(**settings: Any) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM`, `EngineArgs` and `AsyncEngineArgs`.

    Args:
        settings: fields of `RkvConfig`, by name.

    Returns: arguments to pass on, as in `LLM(model=..., **rkv_engine_args(budget=1024))`.

    Raises: ValueError (pydantic's ValidationError) that names each wrong setting.
    """
    config = RkvConfig(**settings)
    return {
        "scheduler_cls": SCHEDULER,
        "worker_cls": _worker_class(),
        "logits_processors": [VALIDATOR],
        "additional_config": {"rkv": config.model_dump(exclude_unset=True)},
    }


def rkv_serve_flags(config: RkvConfig) -> list[str]:
    """What `rkv_engine_args` gives, as flags of `vllm serve`; each is one word without blanks or quotes."""
    flags = [
        f"--scheduler-cls={SCHEDULER}",
        f"--worker-cls={_worker_class()}",
        f"--logits-processors={VALIDATOR}",
    ]
    settings = config.model_dump(exclude_none=True)
    return flags + [f"--additional-config.rkv.{name}={value}" for name, value in settings.items()]


def _worker_class() -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "rkv_vllm.execution.cpu.worker.CompactingCpuWorker"
    return "rkv_vllm.execution.gpu.worker.CompactingGpuWorker"
