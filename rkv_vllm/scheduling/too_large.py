"""Requests that the whole pool cannot hold."""

from __future__ import annotations

from vllm.v1.request import Request

from rkv_vllm.decisions.sizing import peak_slots
from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.scheduling.tracked_request import TrackedRequest


def too_large(
    request: Request, length: int, tracked: TrackedRequest | None, groups: PageGroups, usable_pages: int
) -> str | None:
    """Why a request cannot be served, and what would help; None where the pool can hold it.

    It would wait for ever, and all requests behind it. None is too large unless the server lets max_model_len
    exceed the pool.

    Args:
        request: new.
        length: tokens that it has when it ends at the latest.
        tracked: where it has a budget.
        groups: say how many pages it takes.
        usable_pages: of the pool.
    """
    slots = peak_slots(length, tracked.lengths if tracked else None)
    needed = groups.pages(slots) + groups.others.needed_pages(length)
    if needed <= usable_pages:
        return None
    return (
        f"needs {needed} pages of {groups.page_size} tokens, and the whole pool has {usable_pages}: "
        f"{_advice(request, tracked is not None, groups, usable_pages)}"
    )


def _advice(request: Request, has_budget: bool, groups: PageGroups, usable_pages: int) -> str:
    """What would let the pool hold a request that it cannot hold."""
    if request.resumable:
        return "a streaming-input session is reckoned with max_model_len; it needs a larger pool"
    prompt = groups.pages(request.num_prompt_tokens) + groups.others.needed_pages(request.num_prompt_tokens)
    if prompt > usable_pages:
        return f"the prompt alone fills {prompt}; send a shorter one, or have the server given a larger pool"
    if has_budget:
        return "ask for fewer tokens (max_tokens) or for a smaller KV budget"
    return "ask for fewer tokens (max_tokens) or for a KV budget"
