"""The `kv_cache` object of a request body, and the flat `rkv_` keys of `vllm_xargs`, which mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rkv_vllm.server.protocol import FIELD
from rkv_vllm.settings.config import OFF, WINDOW, PolicyName
from rkv_vllm.settings.error_text import shown, shown_name
from rkv_vllm.settings.policy_table import POLICY_NAMES
from rkv_vllm.settings.request_size import is_share
from rkv_vllm.settings.requested import XARGS_PREFIX, RequestedSettings
from rkv_vllm.settings.values import AUTO, PROTECT_TAKES, SwitchText

#: Budget of a request that keeps its full cache.
FULL: Literal["full"] = "full"
XARGS = "vllm_xargs"
#: No context is longer; it keeps what goes to the engine within its integers.
MOST_TOKENS = 2**31 - 1

_TOKENS = f"takes an integer from {WINDOW + 1} to {MOST_TOKENS}"
_BUDGET = f'{_TOKENS}, a share as in "25%", "{AUTO}" or "{FULL}"'
_BUFFER = f"takes an integer from {WINDOW} to {MOST_TOKENS}"
_POLICY = f"takes one of {', '.join(POLICY_NAMES)}"


class KvCacheError(ValueError):
    """A member of `kv_cache` that is wrong or not allowed; `field` is empty where it is the object."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def param(self, *, xargs: bool) -> str:
        """The path of the member in the request's body."""
        if xargs:
            return f"{XARGS}.{XARGS_PREFIX}{self.field}"
        return f"{FIELD}.{self.field}" if self.field else FIELD


def _share(text: str) -> str:
    if not is_share(text):
        raise ValueError("no share")
    return text


#: Of prompt and `max_tokens` together.
Share = Annotated[
    str, Field(pattern=r"^[0-9]{1,3}(\.[0-9]{1,6})?%$", examples=["25%"]), AfterValidator(_share)
]


Tokens = Annotated[int, Field(gt=WINDOW, le=MOST_TOKENS)]


class KvCacheRequest(BaseModel):
    """How much of its KV cache a request keeps while it decodes. What is left out is the server's default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        json_schema_extra={
            "examples": [
                {"budget": 1024},
                {"budget": 512, "policy": "rkv"},
                {"budget": AUTO, "min_budget": 1024},
                {"budget": "25%", "protect": "prompt"},
                {"budget": FULL},
            ]
        },
    )

    budget: Tokens | Literal["auto", "full"] | Share | None = Field(
        default=None,
        description=(
            "Tokens kept per layer and KV head after a compaction; or a share of prompt and `max_tokens` "
            "together, rounded up and brought within the allowed budgets; or `auto`: all of them until "
            "memory is short, and then `min_budget`; or `full`: never compact. `GET /v1/kv_cache` says which "
            "budgets are allowed."
        ),
        examples=[1024, "25%", AUTO, FULL],
    )
    min_budget: Tokens | None = Field(
        default=None,
        description="What the request comes down to where memory is short; with budget `auto`.",
        examples=[1024],
    )
    max_budget: Tokens | None = Field(
        default=None,
        description=(
            "Most tokens that the request holds though memory is not short: then half of them stay; with "
            "budget `auto`."
        ),
        examples=[16384],
    )
    buffer: Annotated[int, Field(ge=WINDOW, le=MOST_TOKENS)] | None = Field(
        default=None,
        description="Tokens collected between two compactions: the cache grows to budget + buffer.",
        examples=[128],
    )
    policy: PolicyName | None = Field(
        default=None, description="What scores the tokens that may be evicted.", examples=["rkv"]
    )
    protect: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | Literal["prompt"] | None = Field(
        default=None,
        description=(
            "First tokens that never leave, or `prompt`: the whole prompt. With the window of the newest 8 "
            "they must leave room in the budget."
        ),
        examples=["prompt", 64],
    )


_Length = Annotated[int, Field(gt=0, le=MOST_TOKENS)]


class XargsRequest(KvCacheRequest):
    """The same in `vllm_xargs`, where an answer can be had once more.

    `switch_at` is the `switches` of its report.
    """

    switch_at: _Length | Annotated[list[SwitchText], Field(min_length=1)] | None = None


_TAKES = {
    "budget": _BUDGET,
    "buffer": _BUFFER,
    "policy": _POLICY,
    "protect": PROTECT_TAKES,
    "min_budget": _TOKENS,
    "max_budget": _TOKENS,
}
_XARGS_TAKE = {
    **_TAKES,
    "switch_at": f'takes an integer from 1 to {MOST_TOKENS}, or a list of steps as in "1490:745"',
}


def read_kv_cache(value: Any) -> KvCacheRequest:
    """The `kv_cache` member of a request's body; None is one that names nothing.

    Raises: KvCacheError for the first wrong member.
    """
    if value is None:
        return KvCacheRequest()
    if not isinstance(value, dict):
        raise KvCacheError("", f"takes an object with {', '.join(_TAKES)}, not {shown(value)}")
    for name in value:
        if name not in _TAKES:
            raise KvCacheError(shown_name(name), f"is unknown (known: {', '.join(_TAKES)})")
    return _read(KvCacheRequest, value, _TAKES)


def _read(model: type[KvCacheRequest], value: dict[str, Any], takes: Mapping[str, str]) -> KvCacheRequest:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        raise KvCacheError(field, f"{takes[field]}, not {shown(value[field])}") from None


def read_xargs(xargs: Mapping[str, Any] | None) -> KvCacheRequest:
    """The `rkv_` keys of a request's `vllm_xargs`; those of others are left alone.

    Raises: KvCacheError for the first wrong key.
    """
    ours = {key: value for key, value in (xargs or {}).items() if key.startswith(XARGS_PREFIX)}
    for key, value in ours.items():
        try:
            RequestedSettings.from_extra_args({key: value})
        except ValueError as error:
            message = str(error).removeprefix(shown_name(key)).lstrip()
            raise KvCacheError(shown_name(key.removeprefix(XARGS_PREFIX)), message) from None
    named = {key.removeprefix(XARGS_PREFIX): value for key, value in ours.items()}
    if named.get("budget") == OFF:
        named["budget"] = FULL
    return _read(XargsRequest if "switch_at" in named else KvCacheRequest, named, _XARGS_TAKE)
