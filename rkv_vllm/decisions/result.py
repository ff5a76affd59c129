"""What compaction did to one finished request: the proof that travels back with its answer."""

from __future__ import annotations

from typing import TypedDict

#: Key of the result in `RequestOutput.kv_transfer_params`, vLLM's one free-form field on a finished request.
RESULT_KEY = "rkv"

#: Key, beside it, of why a request was refused that the whole pool cannot hold.
REFUSAL_KEY = "rkv_refusal"


class CompactionResult(TypedDict):
    """`pages_without_compaction` is what the request's logical length would fill; `reason` says why nothing
    was compacted, and is None where something was."""

    budget: int | None
    buffer: int | None
    policy: str | None
    compactions: int
    evicted_tokens: int
    peak_pages: int
    pages_without_compaction: int
    page_size: int
    reason: str | None
