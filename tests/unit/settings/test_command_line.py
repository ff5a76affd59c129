"""The command line that `rkv-vllm serve` gives to vLLM, parsed by vLLM's own parser."""

from __future__ import annotations

from argparse import Namespace

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rkv_vllm.host.moved import make_arg_parser
from rkv_vllm.settings.command_line import MIDDLEWARE, OPERATIONS, serve_arguments
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.engine_args import SCHEDULER, VALIDATOR, rkv_serve_flags


def parsed(*users: str) -> Namespace:
    parser = FlexibleArgumentParser()
    serve = make_arg_parser(parser.add_subparsers(dest="subparser").add_parser("serve"))
    assert serve is not None
    ours = rkv_serve_flags(RkvConfig(budget=512))
    return parser.parse_args(["serve", *serve_arguments(list(users), ours)])


def test_switches_everything_on() -> None:
    """Scheduler, worker, validator, settings and middleware all arrive, and the model stays the model."""
    arguments = parsed("some/model", "--max-model-len", "2048")
    assert arguments.model_tag == "some/model"
    assert arguments.max_model_len == 2048
    assert arguments.scheduler_cls == SCHEDULER
    assert arguments.worker_cls.startswith("rkv_vllm.")
    assert arguments.logits_processors == [VALIDATOR]
    assert arguments.additional_config["rkv"]["budget"] == 512
    assert arguments.middleware == [MIDDLEWARE, OPERATIONS]


@pytest.mark.parametrize(
    "users",
    [
        ("--additional-config", '{"theirs": {"a": 1}, "rkv": {"buffer": 64}}'),
        ('--additional_config={"theirs": {"a": 1}}',),
        ("--additional-config.theirs.a", "1"),
    ],
)
def test_keeps_the_users_additional_config(users: tuple[str, ...]) -> None:
    """In whichever of vLLM's three forms it was given, it is there beside ours."""
    settings = parsed("some/model", *users).additional_config
    assert settings["theirs"] == {"a": 1}
    assert settings["rkv"]["budget"] == 512


@pytest.mark.parametrize("users", [("--logits-processors", "a:B", "c:D"), ("--logits-processors=a:B",)])
def test_keeps_the_users_logits_processors(users: tuple[str, ...]) -> None:
    """The user's processors go behind ours."""
    processors = parsed("some/model", *users).logits_processors
    assert processors[:2] == [VALIDATOR, "a:B"]


def test_keeps_the_users_middleware() -> None:
    """`--middleware` is one that vLLM collects."""
    assert parsed("some/model", "--middleware", "a.B").middleware == ["a.B", MIDDLEWARE, OPERATIONS]


@pytest.mark.parametrize("option", ["--scheduler-cls", "--scheduler_cls=x.Y", "--worker-cls"])
def test_refuses_another_scheduler_or_worker(option: str) -> None:
    """Two extensions cannot both replace them."""
    with pytest.raises(ValueError, match="is set by rkv-vllm"):
        serve_arguments(["some/model", option, "x.Y"], [])


@pytest.mark.parametrize("text", ["[1]", "{", '{"a.b": 1}'])
def test_refuses_settings_it_cannot_merge(text: str) -> None:
    """Rather than drop what the user asked for."""
    with pytest.raises(ValueError, match="JSON object"):
        serve_arguments(["--additional-config", text], [])


def test_flags_survive_a_shell() -> None:
    """`vllm serve MODEL $(rkv-vllm args ...)` splits at blanks, and knows no quotes."""
    for flag in rkv_serve_flags(RkvConfig(budget=512, buffer=64, policy="snapkv")):
        assert not set(flag) & set(" \t\n'\"\\*?[]{}$`")
