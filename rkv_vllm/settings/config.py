"""What a server and a request may ask for, validated once; no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rkv_vllm.kernels.options import Order, Scope
from rkv_vllm.settings.policy_table import DEFAULT_POLICY, NUM_QUERIES, PolicyName
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import NOTHING_ASKED, CannotBeServed, RequestedSettings
from rkv_vllm.settings.values import (
    AUTO,
    OFF,
    WINDOW,
    Budget,
    BudgetTokens,
    BufferTokens,
    Protected,
    Switch,
)

#: Width of the max-pool over candidates' importance.
POOL_KERNEL = 7
#: Cosine similarity above which two keys count as redundant (T in rkv_spec 1.3).
SIMILARITY_THRESHOLD = 0.5

Granularity = Literal["token", "page"]
#: Why whole pages and budget "auto" exclude each other, behind what names either.
AUTO_NEEDS_TOKENS = "needs granularity token: which pages leave is known too late to make room in time"


@dataclass(frozen=True, slots=True)
class AutoBudget:
    """How long a request keeps its full cache where that is not for the scheduler alone to decide.

    Attributes:
        max_budget: tokens that it holds at most, and is brought down from by a half; None: no bound.
        switch_at: how it comes down, whatever memory there is; None: the scheduler decides.
    """

    max_budget: int | None = None
    switch_at: tuple[Switch, ...] | None = None


@dataclass(frozen=True, slots=True)
class CompactionSettings:
    """The settings in force for one request that is compacted.

    `budget` tokens stay per layer and KV head after a compaction, the window included; `buffer` tokens are
    collected between two compactions; `policy` chooses which tokens stay, but for the first `protect`
    tokens, which always do. With `auto` all this begins once memory is short: `budget` is the `min_budget`
    that was asked for.
    """

    budget: int
    buffer: int
    policy: PolicyName
    protect: int = 0
    auto: AutoBudget | None = None

    @property
    def threshold(self) -> int:
        """Physical length, in tokens, at which a compaction is due."""
        return self.budget + self.buffer

    @property
    def num_queries(self) -> int:
        """Newest tokens whose queries a compaction looks at: no two look at the same, whatever the buffer."""
        return min(NUM_QUERIES[self.policy], self.buffer)


def extra_args(settings: CompactionSettings | None) -> dict[str, int | str | list[str]]:
    """What a request sends for these settings, in `SamplingParams.extra_args` or `vllm_xargs` over HTTP.

    `settings` None: full cache, whatever the server's default.
    """
    if settings is None:
        return {"rkv_budget": OFF}
    common: dict[str, int | str | list[str]] = {
        "rkv_buffer": settings.buffer,
        "rkv_policy": settings.policy,
        "rkv_protect": settings.protect,
    }
    if settings.auto is None:
        return {"rkv_budget": settings.budget, **common}
    given: dict[str, int | list[str]] = {}
    if settings.auto.max_budget is not None:
        given["rkv_max_budget"] = settings.auto.max_budget
    if settings.auto.switch_at is not None:
        given["rkv_switch_at"] = [str(switch) for switch in settings.auto.switch_at]
    return {"rkv_budget": AUTO, "rkv_min_budget": settings.budget, **given, **common}


def check_protected(protect: int | str, budget: int | str | None) -> None:
    """Raises: CannotBeServed where the first `protect` tokens leave no token of `budget` to choose.

    Where one of them is not a number yet, it is checked with each request.
    """
    if isinstance(protect, int) and isinstance(budget, int) and protect and budget <= protect + WINDOW:
        raise CannotBeServed(
            f"{protect} protected tokens and the window of {WINDOW} do not fit into a budget of {budget}: "
            f"it takes at least {protect + WINDOW + 1}"
        )


def check_max_budget(max_budget: int | None, min_budget: int) -> None:
    """Raises: CannotBeServed where a request would have to switch before it has more than its budget."""
    if max_budget is not None and max_budget <= min_budget:
        raise CannotBeServed(f"{max_budget} is not above min_budget, {min_budget}")


class RequestDefaults(BaseModel):
    """Settings of a request that the server has a default for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: Budget | None = Field(
        default=None,
        description=(
            "Tokens kept per layer and KV head where a request names no budget, or a share as in 25% of the "
            "longest that it may become, or `auto`: all of them until memory is short; none: full cache."
        ),
    )
    min_budget: BudgetTokens = Field(
        default=1024, description="Budget of a request with budget `auto` from when memory is short."
    )
    max_budget: BudgetTokens | None = Field(
        default=None,
        description="Most tokens that a request with budget `auto` holds: then half of them stay.",
    )
    buffer: BufferTokens = Field(default=128, description="Tokens collected between two compactions.")
    policy: PolicyName = Field(default=DEFAULT_POLICY, description="What scores tokens.")
    protect: Protected = Field(
        default=0, description="First tokens of a request that never leave, or `prompt`: its whole prompt."
    )


class EngineSettings(BaseModel):
    """Settings that all requests of an engine share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mix_lambda: float = Field(
        default=0.1, ge=0.0, le=1.0, description="Weight of importance against redundancy in policy rkv."
    )
    beyond_pool: bool = Field(
        default=False,
        description="Let max_model_len exceed what the pool holds; a request that cannot fit is refused.",
    )
    auto_usage: float = Field(
        default=0.9,
        gt=0.0,
        le=1.0,
        description="Share of the pool that is filled before requests with budget `auto` lose any token.",
    )
    granularity: Granularity = Field(
        default="token",
        description=(
            "What leaves: tokens, per layer and KV head, or whole pages of all of them. By page nothing is "
            "moved; the budget is rounded up to whole pages, the last and partly filled one among them."
        ),
    )
    scope: Scope = Field(
        default="head",
        description=(
            "Who shares one set of kept tokens: each KV head of each layer has its own, all heads of a layer "
            "share one, by the mean of their scores, or all layers do, by the sum of those means."
        ),
    )
    order: Order = Field(
        default="temporal",
        description="How survivors lie in the cache: oldest first, or best first and the window behind them.",
    )

    @field_validator("scope", "order")
    @classmethod
    def _by_token_only(cls, value: str, info: ValidationInfo) -> str:
        if value not in ("head", "temporal") and info.data.get("granularity") == "page":
            raise ValueError(f"{value} needs granularity token: whole pages leave for all, and none is moved")
        return value


class RkvConfig(EngineSettings, RequestDefaults):
    """Server-wide settings, carried in vLLM's `additional_config["rkv"]`."""

    @field_validator("beyond_pool")
    @classmethod
    def _needs_budget(cls, beyond: bool, info: ValidationInfo) -> bool:
        # Where the budget itself was refused it is not in `data`, and that is the error to show.
        if beyond and info.data.get("budget", "refused") is None:
            raise ValueError("needs a default budget: without one, long requests would keep their full cache")
        return beyond

    @field_validator("max_budget")
    @classmethod
    def _above_min_budget(cls, max_budget: int | None, info: ValidationInfo) -> int | None:
        if "min_budget" in info.data:
            check_max_budget(max_budget, info.data["min_budget"])
        return max_budget

    @field_validator("protect")
    @classmethod
    def _fits_into_budget(cls, protect: int | str, info: ValidationInfo) -> int | str:
        budget = info.data.get("budget")
        check_protected(protect, info.data.get("min_budget") if budget == AUTO else budget)
        return protect

    @field_validator("granularity")
    @classmethod
    def _auto_is_by_token(cls, granularity: Granularity, info: ValidationInfo) -> Granularity:
        if granularity == "page" and info.data.get("budget") == AUTO:
            raise ValueError(AUTO_NEEDS_TOKENS)
        return granularity

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any]) -> RkvConfig:
        """Reads the settings out of vLLM's `additional_config`.

        Raises: ValueError where the key `rkv` is missing; pydantic's ValidationError (a ValueError) where a
        value is out of bounds.
        """
        if "rkv" not in additional_config:
            raise ValueError(
                "rkv-vllm's scheduler or worker is selected, but additional_config has no key 'rkv': take "
                "the arguments from rkv_vllm.rkv_engine_args(...) or from `rkv-vllm args`"
            )
        return cls.model_validate(additional_config["rkv"])

    def resolve(self, request: RequestedSettings, size: RequestSize) -> CompactionSettings | None:
        """The settings in force for a request, or None where it keeps its full cache.

        Raises: CannotBeServed where what it asks for contradicts itself or the server's settings.
        """
        budget = self.budget if request.rkv_budget is None else request.rkv_budget
        if budget != AUTO:
            request.refuse_what_auto_takes()
        if budget is None or budget == OFF:
            return None
        auto = None
        if budget == AUTO:
            if self.granularity == "page":
                raise CannotBeServed(f'budget "{AUTO}" {AUTO_NEEDS_TOKENS}')
            budget = self.min_budget if request.rkv_min_budget is None else request.rkv_min_budget
            max_budget = self.max_budget if request.rkv_max_budget is None else request.rkv_max_budget
            check_max_budget(max_budget, budget)
            auto = AutoBudget(max_budget, request.switches(budget))
        protect = self.protect if request.rkv_protect is None else request.rkv_protect
        settings = CompactionSettings(
            budget=max(size.tokens_of(budget), WINDOW + 1) if isinstance(budget, str) else budget,
            buffer=self.buffer if request.rkv_buffer is None else request.rkv_buffer,
            policy=self.policy if request.rkv_policy is None else request.rkv_policy,
            protect=size.prompt if isinstance(protect, str) else protect,
            auto=auto,
        )
        check_protected(settings.protect, settings.budget)
        return settings

    def resolve_default(self, longest: int) -> CompactionSettings | None:
        """The settings of a request that names none, of up to `longest` tokens; its prompt is not counted.

        Raises: CannotBeServed as `resolve`.
        """
        return self.resolve(NOTHING_ASKED, RequestSize(prompt=0, longest=longest))
