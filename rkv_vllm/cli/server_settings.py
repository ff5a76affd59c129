"""The options of `rkv-vllm serve` beside vLLM's, for every command that takes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer
from pydantic import ValidationError

from rkv_vllm.cli.options import OptionGroup
from rkv_vllm.server.caller_rules import ENVIRONMENT_PREFIX, KvSettings
from rkv_vllm.server.operations import PREFIX, OperationSettings
from rkv_vllm.server.rules_by_api_key import RulesByApiKey
from rkv_vllm.settings.error_text import explain, nearest, one_line, shown_name

KV_CACHE = OptionGroup("kv", KvSettings, prefix="--kv-", environment=ENVIRONMENT_PREFIX, panel="KV cache")
OPERATION = OptionGroup(
    "operation",
    OperationSettings,
    names=tuple(name for name in OperationSettings.model_fields if name != "api_keys"),  # not to be seen
    environment=PREFIX,
    panel="Operation",
)


#: What Kubernetes and Docker set for a service whose name begins with `rkv`.
_SERVICE_LINK = re.compile(r"_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)$")


def refuse_unknown_variables() -> None:
    """
    Raises: typer.BadParameter that names each variable of the environment that begins as ours do and is none.
    """
    known = [*OperationSettings.model_fields, *(f"kv_{name}" for name in KvSettings.model_fields)]
    variables = [f"{PREFIX}{name.upper()}" for name in known]
    wrong = [
        f"{shown_name(name)} is no setting{nearest(name.upper(), variables)}"
        for name in os.environ
        if name.upper().startswith(PREFIX)
        and name.upper() not in variables
        and not _SERVICE_LINK.search(name)
    ]
    if wrong:
        raise typer.BadParameter(one_line(wrong))


@contextmanager
def _wrong_ones_named(group: OptionGroup, chosen: dict[str, Any]) -> Iterator[None]:
    """Turns what is said of wrong settings into an error of the command line."""
    try:
        yield
    except ValidationError as error:
        named = partial(group.source_of, chosen=chosen)
        raise typer.BadParameter(explain(error, depth=1, named=named)) from None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None


def kv_settings(chosen: dict[str, Any]) -> tuple[KvSettings, RulesByApiKey]:
    """The server's settings and what follows for each caller; flags go before the environment.

    Raises: typer.BadParameter that names each wrong one.
    """
    with _wrong_ones_named(KV_CACHE, chosen):
        settings = KvSettings(**chosen)
        settings.engine  # noqa: B018 - checks the engine's own settings together
        return settings, RulesByApiKey.load(settings)


def operation_settings(chosen: dict[str, Any]) -> OperationSettings:
    """The settings of the server's operation; flags go before the environment.

    Raises: typer.BadParameter that names each wrong one.
    """
    with _wrong_ones_named(OPERATION, chosen):
        settings = OperationSettings(**chosen)
        settings.read_keys()
        return settings


def to_environment(kv: dict[str, Any], operation: OperationSettings) -> None:
    """Puts what was chosen where vLLM's processes find it.

    Args:
        kv: the KV cache settings that were chosen, by field.
    """
    os.environ |= {f"{ENVIRONMENT_PREFIX}{name.upper()}": str(value) for name, value in kv.items()}
    os.environ |= operation.to_environment()
