"""What one request asks for in vLLM's free-form parameters; no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rkv_vllm.settings.error_text import one_line, shown, shown_name
from rkv_vllm.settings.policy_table import POLICY_NAMES, PolicyName
from rkv_vllm.settings.values import (
    AUTO,
    BUDGET_TAKES,
    OFF,
    PROTECT_TAKES,
    WINDOW,
    BudgetTokens,
    BufferTokens,
    Length,
    OffOrBudget,
    Protected,
    Switch,
    SwitchText,
)

#: Prefix of our keys in a request's `vllm_xargs`.
XARGS_PREFIX = "rkv_"


class CannotBeServed(ValueError):
    """What a request asks for contradicts itself, or the server's settings."""


class RequestedSettings(BaseModel):
    """What one request asks for in `SamplingParams.extra_args` (`vllm_xargs` over HTTP).

    None is the server's default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rkv_budget: OffOrBudget | None = None
    rkv_buffer: BufferTokens | None = None
    rkv_policy: PolicyName | None = None
    rkv_protect: Protected | None = None
    rkv_min_budget: BudgetTokens | None = None
    rkv_max_budget: BudgetTokens | None = None
    rkv_switch_at: Length | Annotated[list[SwitchText], Field(min_length=1)] | None = None

    def switches(self, budget: int) -> tuple[Switch, ...] | None:
        """How it is told to come down to its budget; None: it is not told."""
        told = self.rkv_switch_at
        if isinstance(told, list):
            return tuple(map(Switch.parse, told))
        return None if told is None else (Switch(told, budget),)

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestedSettings:
        """Reads our keys, all those that begin with `rkv_`, and leaves the others alone.

        Raises: ValueError, one line that names each wrong field and says what it takes; of what was given no
        more than fits into a line of a log.
        """
        if not extra_args:
            return NOTHING_ASKED
        ours = {key: value for key, value in extra_args.items() if key.startswith(XARGS_PREFIX)}
        if not ours:
            return NOTHING_ASKED
        try:
            asked = cls.model_validate(ours)
        except ValidationError as error:
            wrong = [str(part) for problem in error.errors() for part in problem["loc"][:1]]
            unknown = [key for key in ours if key not in cls.model_fields]  # pydantic cannot name all of them
            problems = [f"{key} {_TAKES[key]}, not {shown(ours[key])}" for key in wrong if key in _TAKES]
            problems += [f"{shown_name(key)} is unknown" for key in unknown]
            known = f" (known: {', '.join(_TAKES)})" if unknown else ""
            raise ValueError(one_line(problems) + known) from None
        if asked.rkv_budget not in (None, AUTO):
            asked.refuse_what_auto_takes()
        return asked

    def refuse_what_auto_takes(self) -> None:
        """Raises: CannotBeServed that names what was given for budget "auto" alone."""
        for_auto = {
            "rkv_min_budget": self.rkv_min_budget,
            "rkv_max_budget": self.rkv_max_budget,
            "rkv_switch_at": self.rkv_switch_at,
        }
        given = [field for field, value in for_auto.items() if value is not None]
        if given:
            raise CannotBeServed(f'{", ".join(given)}: only with budget "{AUTO}"')


NOTHING_ASKED = RequestedSettings()
_TAKES = {
    "rkv_budget": BUDGET_TAKES.replace("takes", f"takes {OFF} (full cache),"),
    "rkv_buffer": f"takes an integer of at least {WINDOW}",
    "rkv_policy": f"takes one of {', '.join(POLICY_NAMES)}",
    "rkv_protect": PROTECT_TAKES,
    "rkv_min_budget": f"takes an integer above {WINDOW}",
    "rkv_max_budget": f"takes an integer above {WINDOW}",
    "rkv_switch_at": 'takes an integer above 0, or a list of steps as in "1490:745"',
}
