"""What the requests of a caller may ask for and what they get by default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rkv_vllm.server.protocol import (
    BudgetBounds,
    BufferBounds,
    KvCacheBounds,
    PolicyChoice,
    ProtectDefault,
)
from rkv_vllm.server.request import FULL, KvCacheError, KvCacheRequest, XargsRequest
from rkv_vllm.settings.config import (
    AUTO_NEEDS_TOKENS,
    OFF,
    WINDOW,
    EngineSettings,
    Granularity,
    PolicyName,
    RkvConfig,
    check_max_budget,
    check_protected,
)
from rkv_vllm.settings.error_text import shown
from rkv_vllm.settings.policy_table import DEFAULT_POLICY, POLICY_NAMES
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import CannotBeServed, RequestedSettings
from rkv_vllm.settings.values import AUTO, BudgetTokens, BufferTokens, Protected, is_budget, number

#: The environment variable of a setting is this and its name in capitals, as in RKV_KV_BUDGET_MAX.
ENVIRONMENT_PREFIX = "RKV_KV_"


def _names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def _default_budget(value: Any) -> Any:
    budget = number(value)
    if budget != FULL and not is_budget(budget):
        allowed = f'an integer above {WINDOW}, a share as in "25%", "{AUTO}" or "{FULL}"'
        raise ValueError(f"takes {allowed}, not {shown(value)}")
    return budget


Budget = Annotated[BudgetTokens, BeforeValidator(number)]
Buffer = Annotated[BufferTokens, BeforeValidator(number)]
DefaultBudget = Annotated[int | str, BeforeValidator(_default_budget)]
DefaultProtect = Annotated[Protected, BeforeValidator(number)]
Names = Annotated[tuple[PolicyName, ...], Field(min_length=1), BeforeValidator(_names), NoDecode]


class CallerRules(BaseModel):
    """Defaults and bounds of one caller's requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: DefaultBudget = Field(
        default=FULL,
        description=(
            "Budget of a request that names none: tokens, a share as in 25% of the longest that it may "
            "become, `auto`: all tokens until memory is short, or `full`."
        ),
    )
    min_budget: Budget = Field(
        default=1024, description="Budget of a request with budget `auto` from when memory is short."
    )
    max_budget: Budget | None = Field(
        default=None,
        description="Most tokens that a request with budget `auto` holds: then half of them stay.",
    )
    budget_min: Budget | None = Field(default=None, description="Smallest budget a request may name.")
    budget_max: Budget | None = Field(
        default=None,
        description=(
            "Largest budget a request may name; refuses `full` and `auto`, and buffers above the default."
        ),
    )
    buffer: Buffer = Field(default=128, description="Tokens collected between two compactions.")
    policy: PolicyName = Field(default=DEFAULT_POLICY, description="Of a request that names none.")
    policies: Names = Field(
        default=POLICY_NAMES, description="Policies a request may choose, separated by commas."
    )
    protect: DefaultProtect = Field(
        default=0, description="First tokens of a request that never leave, or `prompt`: its whole prompt."
    )
    require_budget: bool = Field(default=False, description="Refuse requests that name no budget.")
    _granularity: Granularity = PrivateAttr(default="token")

    @model_validator(mode="after")
    def _defaults_within_bounds(self) -> Self:
        smallest, largest = self.budgets
        if largest is not None and smallest > largest:
            raise ValueError(f"budget_min: {smallest} is above budget_max, {largest}")
        if self.policy not in self.policies:
            raise ValueError(f"policy: {self.policy} is not one of policies, {', '.join(self.policies)}")
        try:
            check_max_budget(self.max_budget, self.min_budget)
        except CannotBeServed as error:
            raise ValueError(f"max_budget: {error}") from None
        check_protected(self.protect, self.min_budget if self.budget == AUTO else self.budget)
        if self.require_budget:
            return self  # the default is never used
        if isinstance(self.budget, int) and self.budget < smallest:
            raise ValueError(f"budget: the default, {self.budget}, is below budget_min, {smallest}")
        above = isinstance(self.budget, int) and largest is not None and self.budget > largest
        if above or (self.budget in (AUTO, FULL) and largest is not None):
            raise ValueError(
                f"budget: the default, {self.budget}, is above budget_max, {largest}: "
                "set a default within the bounds, or require_budget"
            )
        return self

    def on_engine(self, settings: EngineSettings) -> Self:
        """The same rules, where what such an engine cannot do is refused.

        Raises: ValueError where that is the default.
        """
        rules = self.model_copy()
        rules._granularity = settings.granularity
        if rules.budget == AUTO and not rules._may_be_auto and not rules.require_budget:
            raise ValueError(f'budget: the default, "{AUTO}", {AUTO_NEEDS_TOKENS}')
        return rules

    @property
    def _may_be_auto(self) -> bool:
        return self._granularity != "page"

    @property
    def budgets(self) -> tuple[int, int | None]:
        """The smallest and the largest budget, in tokens, that a request may name."""
        return self.budget_min or WINDOW + 1, self.budget_max

    def bounds(self) -> KvCacheBounds:
        """What a client is told."""
        smallest, largest = self.budgets
        return KvCacheBounds(
            budget=BudgetBounds(
                default=None if self.require_budget else self.budget,
                required=self.require_budget,
                min=smallest,
                max=largest,
                full=largest is None,
                auto=largest is None and self._may_be_auto,
                min_budget=max(self.min_budget, smallest),
            ),
            buffer=BufferBounds(
                default=self.buffer, min=WINDOW, max=None if largest is None else self.buffer
            ),
            policy=PolicyChoice(default=self.policy, allowed=list(self.policies)),
            protect=ProtectDefault(default=self.protect),
        )

    def resolve(self, asked: KvCacheRequest) -> RequestedSettings:
        """What the engine is told about a request, but for what depends on its size: see `settle`.

        Raises: KvCacheError that names the member of `kv_cache` which is out of bounds, or missing.
        """
        budget = asked.budget
        smallest, largest = self.budgets
        upwards = f"{smallest} to {largest}" if largest else f"at least {smallest}"
        auto = f', "{AUTO}"' if self._may_be_auto else ""
        allowed = f"{upwards} tokens" if largest else f'{upwards} tokens{auto} or "{FULL}"'
        if budget is None:
            if self.require_budget:
                raise KvCacheError("budget", f"is required here: {allowed}")
            budget = self.budget
        elif budget in (AUTO, FULL):
            if largest is not None:
                raise KvCacheError("budget", f'may not be "{budget}" here: {allowed}')
        elif isinstance(budget, int) and (budget < smallest or (largest is not None and budget > largest)):
            raise KvCacheError("budget", f"is {budget}, which is not allowed here: {allowed}")
        if asked.buffer is not None and largest is not None and asked.buffer > self.buffer:
            raise KvCacheError(
                "buffer", f"is {asked.buffer}, which is not allowed here: at most {self.buffer}"
            )
        if asked.policy is not None and asked.policy not in self.policies:
            raise KvCacheError(
                "policy", f'is "{asked.policy}", which is not allowed here: {", ".join(self.policies)}'
            )
        if budget == AUTO and not self._may_be_auto:
            raise KvCacheError("budget", f'may not be "{AUTO}" here: it {AUTO_NEEDS_TOKENS}')
        return RequestedSettings(
            **self._auto(asked, budget),
            rkv_budget=OFF if budget == FULL else budget,
            rkv_buffer=asked.buffer or self.buffer,
            rkv_policy=asked.policy or self.policy,
            rkv_protect=self.protect if asked.protect is None else asked.protect,
        )

    def _auto(self, asked: KvCacheRequest, budget: int | str) -> dict[str, Any]:
        """What the engine is told of a request with budget `auto` beside that.

        Raises: KvCacheError that names a member which is out of bounds, or is only for budget `auto`.
        """
        switch_at = asked.switch_at if isinstance(asked, XargsRequest) else None
        given = {"min_budget": asked.min_budget, "max_budget": asked.max_budget, "switch_at": switch_at}
        if budget != AUTO:
            for field, value in given.items():
                if value is not None:
                    raise KvCacheError(field, f'goes with budget "{AUTO}", and the budget is {shown(budget)}')
            return {}
        smallest, _ = self.budgets
        min_budget = max(self.min_budget, smallest) if asked.min_budget is None else asked.min_budget
        max_budget = self.max_budget if asked.max_budget is None else asked.max_budget
        if min_budget < smallest:
            raise KvCacheError("min_budget", f"is {min_budget}, and the least here is {smallest}")
        try:
            check_max_budget(max_budget, min_budget)
        except CannotBeServed as error:
            raise KvCacheError("max_budget", str(error)) from None
        told = {"rkv_min_budget": min_budget, "rkv_max_budget": max_budget, "rkv_switch_at": switch_at}
        return {name: value for name, value in told.items() if value is not None}

    def settle(self, settings: RequestedSettings, size: RequestSize) -> RequestedSettings:
        """`settings` in tokens: a share is brought within the bounds, a protected prompt is counted.

        Raises: KvCacheError where what is protected does not fit into the budget.
        """
        budget = settings.rkv_budget
        if isinstance(budget, str) and budget != AUTO:
            smallest, largest = self.budgets
            budget = max(size.tokens_of(budget), smallest)
            budget = budget if largest is None else min(budget, largest)
        protect = size.prompt if settings.rkv_protect == "prompt" else settings.rkv_protect
        if budget == OFF:
            protect = 0
        try:
            check_protected(protect or 0, settings.rkv_min_budget if budget == AUTO else budget)
        except CannotBeServed as error:
            raise KvCacheError("protect", f"cannot be {shown(settings.rkv_protect)}: {error}") from None
        return settings.model_copy(update={"rkv_budget": budget, "rkv_protect": protect})

    def describe(self) -> str:
        """One line for the log."""
        smallest, largest = self.budgets
        default = "none, each request names one" if self.require_budget else self.budget
        return (
            f"default budget {default}, allowed {smallest} to {largest or FULL}; buffer {self.buffer}; "
            f"policy {self.policy} of {', '.join(self.policies)}; protected tokens {self.protect}"
        )


class KvSettings(EngineSettings, CallerRules, BaseSettings):
    """The rules for all callers, the engine's settings, and the file of rules by API key.

    Each setting comes from a flag, else from the environment.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    key_policies: Path | None = Field(
        default=None,
        description="YAML file with what differs by API key: SHA-256 of the key, and settings below it.",
    )

    @property
    def engine(self) -> RkvConfig:
        """The engine's own defaults, which are there for requests that come to it without HTTP."""
        settings = self.model_dump(include=set(RkvConfig.model_fields))
        return RkvConfig(**(settings | {"budget": None if self.budget == FULL else self.budget}))
