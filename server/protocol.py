"""What this package adds to the bodies of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rkv_vllm.decisions.messages import RESULT_KEY, CompactionResult

#: Name of the object in a request and in an answer, where it stands beside `usage`.
FIELD = "kv_cache"


class KvCacheReport(BaseModel):
    """What happened to the KV cache of one HTTP request.

    The numbers are sums over the request's sequences: its choices (`n`), its prompts, its turns between tool
    calls. Pages that sequences share are counted for each.
    """

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {
                    "budget": 512,
                    "policy": "rkv",
                    "buffer": 128,
                    "compactions": 3,
                    "evicted_tokens": 384,
                    "peak_pages": 20,
                    "pages_without_compaction": 29,
                    "page_size": 16,
                }
            ]
        },
    )

    budget: int | Literal["auto", "full"] = Field(
        description=(
            "Tokens kept per layer and KV head after each compaction; `auto`: all of them until memory was "
            "short; `full`: never compacted."
        )
    )
    min_budget: int | None = Field(
        default=None, description="What it goes down to where memory is short; with budget `auto`."
    )
    full_cache_tokens: int | None = Field(
        default=None,
        description=(
            "Length, in tokens, up to which nothing was evicted. With budget `auto`, where something was "
            "evicted; of several sequences the shortest."
        ),
    )
    switches: list[str] | None = Field(
        default=None,
        description=(
            "Steps in which it came down, each the length in tokens at which it did and the tokens that "
            "stayed. They alone decide the answer: as `rkv_switch_at` in `vllm_xargs` they give the same one "
            "again. With budget `auto`, where something was evicted; absent for several sequences."
        ),
        examples=[["1490:745"]],
    )
    policy: str | None = Field(default=None, description="What scored tokens; absent with budget `full`.")
    buffer: int | None = Field(
        default=None, description="Tokens collected between two compactions; absent with budget `full`."
    )
    protect: int | None = Field(
        default=None, description="First tokens that never leave; absent where none were protected."
    )
    compactions: int = Field(description="Compactions that ran.")
    evicted_tokens: int = Field(description="Tokens that left the cache before the end.")
    peak_pages: int = Field(description="Most pages of the KV cache held at a time.")
    pages_without_compaction: int = Field(description="Pages that the whole length would have filled.")
    page_size: int = Field(description="Tokens that a page holds.")
    sequences: int = Field(
        default=1, description="Over how many sequences the numbers are summed; absent where it is one."
    )
    reason: str | None = Field(
        default=None, description="Why nothing was compacted; absent where something was."
    )

    @classmethod
    def from_result(cls, result: CompactionResult) -> KvCacheReport:
        """The report of what the engine says of a request."""
        return cls.model_validate({**result, "budget": result["budget"] or "full"})

    @classmethod
    def from_kv_transfer_params(cls, params: Mapping[str, Any] | None) -> KvCacheReport | None:
        """The report inside a finished `RequestOutput.kv_transfer_params`; None if the engine sent none."""
        result = (params or {}).get(RESULT_KEY)
        return None if result is None else cls.from_result(result)

    def to_dict(self) -> dict[str, Any]:
        """The object in an answer."""
        return self.model_dump(exclude_none=True, exclude={"sequences"} if self.sequences == 1 else None)


class BudgetBounds(BaseModel):
    default: int | str | None = Field(
        description=(
            "Budget of a request that names none: tokens, a share of the longest that it may become as in "
            "`25%`, `auto` or `full`; null where one is required."
        )
    )
    required: bool = Field(description="Whether a request without a budget is refused.")
    min: int = Field(description="Smallest budget, in tokens.")
    max: int | None = Field(description="Largest budget, in tokens; null: no bound.")
    full: bool = Field(description="Whether `full` is allowed.")
    auto: bool = Field(description="Whether `auto` is allowed.")
    min_budget: int = Field(description="`min_budget` of a request that names none, in tokens.")


class BufferBounds(BaseModel):
    default: int = Field(description="Buffer of a request that names none, in tokens.")
    min: int
    max: int | None = Field(description="null: no bound.")


class ProtectDefault(BaseModel):
    default: int | Literal["prompt"] = Field(
        description="First tokens that never leave where a request does not say; `prompt`: its whole prompt."
    )


class PolicyChoice(BaseModel):
    default: str = Field(description="Policy of a request that names none.")
    allowed: list[str]


class RequestSums(BaseModel):
    running: int
    waiting: int
    compacted: int = Field(description="Of them, those that decode with evicted tokens.")
    auto_full: int = Field(description="Of them, those with budget `auto` that have all their tokens.")
    auto_switched: int = Field(description="Of them, those with budget `auto` that went down.")


class PoolSums(BaseModel):
    pages: int = Field(description="Pages that requests can hold.")
    held: int = Field(description="Pages that they hold.")
    without_compaction: int = Field(description="Pages that they would hold at least, had nothing left.")
    kept_share: float | None = Field(description="The share that is held of those; null: none is held.")


class RecentSums(BaseModel):
    seconds: float = Field(description="The time it is about: a minute, or less soon after the start.")
    rounds: int = Field(description="Compactions.")
    evicted_tokens: int = Field(description="Tokens that left the cache.")
    output_tokens: int = Field(description="Tokens generated.")
    preemptions: int


class ServerSummary(BaseModel):
    """What the server does, summed over all requests, engines and API servers."""

    model: str
    engines: int
    requests: RequestSums
    pool: PoolSums
    last_minute: RecentSums


class KvCacheBounds(BaseModel):
    """What requests with the caller's API key may ask for in `kv_cache`, and what the server does."""

    object: Literal["kv_cache.bounds"] = "kv_cache.bounds"
    budget: BudgetBounds
    buffer: BufferBounds
    policy: PolicyChoice
    protect: ProtectDefault
    summary: ServerSummary | None = Field(
        default=None, description="What the server does right now; null: it keeps no statistics."
    )
