"""The front end's validator, through vLLM's own loaders of both model runners."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
from vllm.v1.worker.gpu.sample.logits_processor.loader import (
    build_custom_logits_processors_params_validator,
)

from rkv_vllm.host.request_validator import BudgetValidator, without_validator
from rkv_vllm.settings.engine_args import VALIDATOR

Validate = Callable[[SamplingParams], None]


def _v1(params: SamplingParams) -> None:
    validate_logits_processors_parameters([VALIDATOR], params)


def _v2(params: SamplingParams) -> None:
    build_custom_logits_processors_params_validator([VALIDATOR])(params)


BOTH = pytest.mark.parametrize("validate", [_v1, _v2], ids=["v1", "v2"])


@BOTH
@pytest.mark.parametrize(
    "extra_args",
    [None, {}, {"other": object()}, {"rkv_budget": 0}, {"rkv_budget": 64, "rkv_policy": "keydiff"}],
)
def test_right_settings_pass(validate: Validate, extra_args: dict[str, Any] | None) -> None:
    """Proves that both runners' front ends let through what the scheduler understands."""
    validate(SamplingParams(extra_args=extra_args))


@BOTH
@pytest.mark.parametrize(
    ("extra_args", "named"),
    [
        ({"rkv_budget": 5}, "rkv_budget"),
        ({"rkv_buffer": "many"}, "rkv_buffer"),
        ({"rkv_policy": "best"}, "rkv_policy"),
        ({"rkv_bugdet": 64}, "rkv_bugdet"),
    ],
)
def test_wrong_settings_are_refused(validate: Validate, extra_args: dict[str, Any], named: str) -> None:
    """Proves that both front ends answer wrong settings with a validation error that names the field."""
    with pytest.raises(VLLMValidationError, match=named):
        validate(SamplingParams(extra_args=extra_args))


@BOTH
@pytest.mark.parametrize("extra_args", [{"rkv_policy": "p" * 15_000}, {"rkv_" + "\ud800\n" * 5000: 1}])
def test_a_refusal_does_not_repeat_what_was_sent_without_end(
    validate: Validate, extra_args: dict[str, Any]
) -> None:
    """Proves that what both front ends answer is short and can be sent, whatever the request has in it."""
    with pytest.raises(VLLMValidationError) as refused:
        validate(SamplingParams(extra_args=extra_args))
    assert str(refused.value).isascii() and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_logits_are_left_alone() -> None:
    """Proves that the class does nothing in either runner's sampler."""
    validator = BudgetValidator(None, torch.device("cpu"), False)
    logits = torch.randn(2, 5)
    assert validator.apply(logits) is logits and validator.apply(logits, None, None) is logits
    assert validator.is_argmax_invariant()
    assert not validator.add_request(0, SamplingParams(extra_args={"rkv_budget": 64}))
    assert validator.update_state(None) is None


@pytest.mark.parametrize("named", [None, [VALIDATOR], [VALIDATOR, "their:Own"]])
def test_runners_that_are_built_do_not_see_it(named: list[str] | None) -> None:
    """Proves that a runner sees the user's processors alone, and the front end all of them again."""
    config: Any = SimpleNamespace(logits_processors=named)
    with pytest.raises(RuntimeError), without_validator(config):
        assert config.logits_processors == [each for each in named or () if each == "their:Own"]
        raise RuntimeError
    assert config.logits_processors == named
