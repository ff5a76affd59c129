"""What a server and a request may ask for, validated once; no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from rkv_vllm.kernels.options import Order, Scope
from rkv_vllm.settings.error_text import one_line, shown, shown_name
from rkv_vllm.settings.policy_table import NUM_QUERIES, POLICY_NAMES, PolicyName
from rkv_vllm.settings.request_size import RequestSize, is_share

#: Newest tokens, which are always kept; their queries give R-KV's importance (the paper's alpha).
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


def is_budget(value: Any) -> bool:
    """Whether this is a number of tokens that leaves some to choose, or a share as in "25%"."""
    is_tokens = isinstance(value, int) and not isinstance(value, bool) and value > WINDOW
    return is_tokens or is_share(value)


def _budget_or_share(value: Any) -> Any:
    if not is_budget(value):
        raise ValueError(f'takes an integer above {WINDOW} or a share as in "25%", not {shown(value)}')
    return value


#: What `protect` takes, behind its name in an error.
PROTECT_TAKES = 'takes a number of tokens from 0 on, or "prompt"'


def _tokens_or_prompt(value: Any) -> Any:
    is_tokens = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_tokens and value != "prompt":
        raise ValueError(f"{PROTECT_TAKES}, not {shown(value)}")
    return value


BudgetOrShare = Annotated[int | str, BeforeValidator(_budget_or_share)]
#: First tokens of a request that never leave.
Protected = Annotated[int | Literal["prompt"], BeforeValidator(_tokens_or_prompt)]


def number(value: Any) -> Any:
    """Digits as the integer they are: command lines and environments hold only text."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _off_or_budget(value: Any) -> Any:
    is_off = isinstance(value, int) and not isinstance(value, bool) and value == OFF
    return value if is_off else _budget_or_share(value)


@dataclass(frozen=True, slots=True)
class CompactionSettings:
    """The settings in force for one request that is compacted.

    `budget` tokens stay per layer and KV head after a compaction, the window included; `buffer` tokens are
    collected between two compactions; `policy` chooses which tokens stay, but for the first `protect`
    tokens, which always do.
    """

    budget: int
    buffer: int
    policy: PolicyName
    protect: int = 0

    @property
    def threshold(self) -> int:
        """Physical length, in tokens, at which a compaction is due."""
        return self.budget + self.buffer

    @property
    def num_queries(self) -> int:
        """Newest tokens whose queries a compaction looks at: no two look at the same, whatever the buffer."""
        return min(NUM_QUERIES[self.policy], self.buffer)


def extra_args(settings: CompactionSettings | None) -> dict[str, int | str]:
    """What a request sends for these settings, in `SamplingParams.extra_args` or `vllm_xargs` over HTTP.

    `settings` None: full cache, whatever the server's default.
    """
    if settings is None:
        return {"rkv_budget": OFF}
    return {
        "rkv_budget": settings.budget,
        "rkv_buffer": settings.buffer,
        "rkv_policy": settings.policy,
        "rkv_protect": settings.protect,
    }


class DoesNotFit(ValueError):
    """What a request protects leaves no room in its budget."""


def check_protected(protect: int | str, budget: int | str | None) -> None:
    """Raises: DoesNotFit where the first `protect` tokens leave no token of `budget` to choose.

    Where one of them is not a number yet, it is checked with each request.
    """
    if isinstance(protect, int) and isinstance(budget, int) and protect and budget <= protect + WINDOW:
        raise DoesNotFit(
            f"{protect} protected tokens and the window of {WINDOW} do not fit into a budget of {budget}: "
            f"it takes at least {protect + WINDOW + 1}"
        )


class RequestDefaults(BaseModel):
    """Settings of a request that the server has a default for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: BudgetOrShare | None = Field(
        default=None,
        description=(
            "Tokens kept per layer and KV head where a request names no budget, or a share as in 25% of the "
            "longest that it may become; none: full cache."
        ),
    )
    buffer: BufferTokens = Field(default=128, description="Tokens collected between two compactions.")
    policy: PolicyName = Field(default="rkv", description="What scores tokens.")
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

    @field_validator("protect")
    @classmethod
    def _fits_into_budget(cls, protect: int | str, info: ValidationInfo) -> int | str:
        check_protected(protect, info.data.get("budget"))
        return protect

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

        Raises: DoesNotFit where what it protects leaves no room in its budget.
        """
        budget = self.budget if request.rkv_budget is None else request.rkv_budget
        if budget is None or budget == OFF:
            return None
        protect = self.protect if request.rkv_protect is None else request.rkv_protect
        settings = CompactionSettings(
            budget=max(size.tokens_of(budget), WINDOW + 1) if isinstance(budget, str) else budget,
            buffer=self.buffer if request.rkv_buffer is None else request.rkv_buffer,
            policy=self.policy if request.rkv_policy is None else request.rkv_policy,
            protect=size.prompt if isinstance(protect, str) else protect,
        )
        check_protected(settings.protect, settings.budget)
        return settings

    def resolve_default(self, longest: int) -> CompactionSettings | None:
        """The settings of a request that names none, of up to `longest` tokens; its prompt is not counted.

        Raises: DoesNotFit as `resolve`.
        """
        return self.resolve(_NOTHING_ASKED, RequestSize(prompt=0, longest=longest))


class RequestedSettings(BaseModel):
    """What one request asks for in `SamplingParams.extra_args` (`vllm_xargs` over HTTP).

    None is the server's default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rkv_budget: Annotated[int | str, BeforeValidator(_off_or_budget)] | None = None
    rkv_buffer: BufferTokens | None = None
    rkv_policy: PolicyName | None = None
    rkv_protect: Protected | None = None

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
        "rkv_budget": f'takes {OFF} (full cache), an integer above {WINDOW} or a share as in "25%"',
        "rkv_buffer": f"takes an integer of at least {WINDOW}",
        "rkv_policy": f"takes one of {', '.join(POLICY_NAMES)}",
        "rkv_protect": PROTECT_TAKES,
    }
    if field not in takes:
        return f"{shown_name(field)} is unknown (known: {', '.join(takes)})"
    return f"{field} {takes[field]}, not {shown(value)}"
