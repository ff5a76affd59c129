"""Refuses a request with wrong R-KV settings at the front end, before the engine sees it.

vLLM asks the classes named in `--logits-processors` to validate each request's parameters, and answers a
ValueError with HTTP 400; `LLM.generate` raises VLLMValidationError. That is all this class is there for: it
changes no logits. It implements the interfaces of both model runners.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from rkv_vllm.settings.engine_args import VALIDATOR
from rkv_vllm.settings.requested import RequestedSettings


class BudgetValidator(LogitsProcessorV2, LogitsProcessorV1):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises: ValueError that names each wrong field."""
        RequestedSettings.from_extra_args(sampling_params.extra_args)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False  # logits need no processing

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor, *context: Any) -> torch.Tensor:
        return logits


@contextmanager
def without_validator(model_config: ModelConfig) -> Iterator[None]:
    """Keeps the validator from a V1 model runner that is built meanwhile.

    The runner has no use for it, and with speculation refuses to be built with any logits processor. The
    front end, which asks it, may read the same configuration.
    """
    named = model_config.logits_processors
    model_config.logits_processors = [name for name in named or () if name != VALIDATOR]
    try:
        yield
    finally:
        model_config.logits_processors = named
