"""The arguments that switch R-KV on, for Python and for the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname

import rkv_vllm
from rkv_vllm.execution.cpu.worker import CompactingCpuWorker
from rkv_vllm.host.request_validator import BudgetValidator
from rkv_vllm.scheduling.scheduler import make_scheduler
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.engine_args import rkv_engine_args, rkv_serve_flags

SETTINGS: dict[str, Any] = {
    "budget": 1024,
    "buffer": 64,
    "policy": "keydiff",
    "mix_lambda": 0.25,
    "beyond_pool": True,
    "granularity": "page",
}
BY_TOKEN: dict[str, Any] = {"budget": 64, "scope": "global", "order": "score"}


def test_names_lead_to_the_classes() -> None:
    """Proves that vLLM finds scheduler, worker and validator by the names that it is given."""
    args = rkv_engine_args(budget=64)
    assert resolve_obj_by_qualname(args["scheduler_cls"]) is make_scheduler
    assert resolve_obj_by_qualname(args["worker_cls"]) is CompactingCpuWorker
    assert [resolve_obj_by_qualname(name.replace(":", ".")) for name in args["logits_processors"]] == [
        BudgetValidator
    ]


@pytest.mark.parametrize("settings", [{}, {"budget": None}, {"budget": 64}, SETTINGS, BY_TOKEN])
def test_settings_survive_the_way_to_the_engine(settings: dict[str, Any]) -> None:
    """Proves that what is asked for is what scheduler and worker read, also as JSON in the engine's hash."""
    additional = rkv_vllm.rkv_engine_args(**settings)["additional_config"]
    carried = json.loads(json.dumps(additional))
    assert RkvConfig.from_additional_config(carried) == RkvConfig(**settings)


def test_engine_args_accept_them() -> None:
    """Proves that the keyword arguments are fields of vLLM's EngineArgs."""
    args = EngineArgs(model="any/model", **rkv_engine_args(**SETTINGS))
    assert args.additional_config == {"rkv": SETTINGS}


@pytest.mark.parametrize("settings", [{}, {"budget": 64}, SETTINGS, BY_TOKEN])
def test_flags_say_the_same(settings: dict[str, Any]) -> None:
    """Proves that the flags, parsed by vLLM, give the same settings and classes as the keyword arguments."""
    flags = rkv_serve_flags(RkvConfig(**settings))
    assert not any(character in flag for flag in flags for character in " '\"")
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = EngineArgs.from_cli_args(parser.parse_args(flags))
    expected = rkv_engine_args(**settings)
    for name in ("scheduler_cls", "worker_cls", "logits_processors"):
        assert getattr(parsed, name) == expected[name]
    assert RkvConfig.from_additional_config(parsed.additional_config) == RkvConfig(**settings)


def test_wrong_settings_are_refused_before_the_engine() -> None:
    """Proves that a wrong setting is named where the user wrote it."""
    with pytest.raises(ValueError, match="budget") as refused:
        rkv_engine_args(budget=3, polcy="rkv")
    assert "polcy" in str(refused.value)
