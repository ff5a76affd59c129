"""What a server and a request may ask for, validated once; no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from rkv_vllm.kernels.options import Order, Scope
from rkv_vllm.settings.error_text import one_line, shown, shown_name
from rkv_vllm.settings.policy_table import POLICY_NAMES, QUERY_POLICIES, PolicyName

#: Newest tokens whose queries give importance; they are always kept (the paper's alpha).
WINDOW = 8
#: Width of the max-pool over candidates' importance.
POOL_KERNEL = 7
#: Cosine similarity above which two keys count as redundant (T in rkv_spec 1.3).
SIMILARITY_THRESHOLD = 0.5

Granularity = Literal["token", "page"]

#: `rkv_budget` of a request that keeps its full cache.
OFF = 0
#: Prefix of our keys in a request's `vllm_xargs`.
XARGS_PREFIX = "rkv_"

BudgetTokens = Annotated[int, Field(gt=WINDOW, strict=True)]
BufferTokens = Annotated[int, Field(ge=WINDOW, strict=True)]


def _off_or_above_window(tokens: int) -> int:
    if tokens != OFF and tokens <= WINDOW:
        raise ValueError("neither off nor above the window")
    return tokens


@dataclass(frozen=True, slots=True)
class CompactionSettings:
    """The settings in force for one request that is compacted.

    `budget` tokens stay per layer and KV head after a compaction, the window included; `buffer` tokens are
    collected between two compactions; `policy` chooses which tokens stay.
    """

    budget: int
    buffer: int
    policy: PolicyName

    @property
    def threshold(self) -> int:
        """Physical length, in tokens, at which a compaction is due."""
        return self.budget + self.buffer

    @property
    def needs_queries(self) -> bool:
        """Whether the policy looks at the queries of the last `WINDOW` tokens."""
        return self.policy in QUERY_POLICIES


def extra_args(settings: CompactionSettings | None) -> dict[str, int | str]:
    """What a request sends for these settings, in `SamplingParams.extra_args` or `vllm_xargs` over HTTP.

    `settings` None: full cache, whatever the server's default.
    """
    if settings is None:
        return {"rkv_budget": OFF}
    return {"rkv_budget": settings.budget, "rkv_buffer": settings.buffer, "rkv_policy": settings.policy}


class RequestDefaults(BaseModel):
    """Settings of a request that the server has a default for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: BudgetTokens | None = Field(
        default=None,
        description="Tokens kept per layer and KV head where a request names no budget; none: full cache.",
    )
    buffer: BufferTokens = Field(default=128, description="Tokens collected between two compactions.")
    policy: PolicyName = Field(default="rkv", description="What scores tokens.")


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

    def resolve(self, request: RequestedSettings) -> CompactionSettings | None:
        """The settings in force for a request, or None where it keeps its full cache."""
        budget = self.budget if request.rkv_budget is None else request.rkv_budget
        if budget is None or budget == OFF:
            return None
        return CompactionSettings(
            budget=budget,
            buffer=self.buffer if request.rkv_buffer is None else request.rkv_buffer,
            policy=self.policy if request.rkv_policy is None else request.rkv_policy,
        )


class RequestedSettings(BaseModel):
    """What one request asks for in `SamplingParams.extra_args` (`vllm_xargs` over HTTP).

    None is the server's default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rkv_budget: Annotated[int, Field(strict=True), AfterValidator(_off_or_above_window)] | None = None
    rkv_buffer: BufferTokens | None = None
    rkv_policy: PolicyName | None = None

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestedSettings:
        """Reads our keys, all those that begin with `rkv_`, and leaves the others alone.

        Raises: ValueError, one line that names each wrong field and says what it takes; of what was given no
        more than fits into a line of a log.
        """
        if not extra_args:
            return _NOTHING_ASKED
        ours = {key: value for key, value in extra_args.items() if key.startswith(XARGS_PREFIX)}
        if not ours:
            return _NOTHING_ASKED
        try:
            return cls.model_validate(ours)
        except ValidationError as error:
            wrong = [str(part) for problem in error.errors() for part in problem["loc"][:1]]
            unknown = [key for key in ours if key not in cls.model_fields]  # pydantic cannot name all of them
            raise ValueError(one_line([_explain(key, ours[key]) for key in [*wrong, *unknown]])) from None


_NOTHING_ASKED = RequestedSettings()


def _explain(field: str, value: Any) -> str:
    takes = {
        "rkv_budget": f"takes {OFF} (full cache) or an integer above {WINDOW}",
        "rkv_buffer": f"takes an integer of at least {WINDOW}",
        "rkv_policy": f"takes one of {', '.join(POLICY_NAMES)}",
    }
    if field not in takes:
        return f"{shown_name(field)} is unknown (known: {', '.join(takes)})"
    return f"{field} {takes[field]}, not {shown(value)}"
