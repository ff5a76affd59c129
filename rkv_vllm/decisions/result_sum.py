"""One result out of several: of the answers of a request, or of the requests behind one HTTP request."""

from __future__ import annotations

from collections.abc import Iterable

from rkv_vllm.decisions.messages import CompactionResult


def combined(results: Iterable[CompactionResult]) -> CompactionResult:
    """The sum of at least one result. `sequences` is there from two on.

    All were asked for with the same settings. Where those depend on the prompt, as a share of its length
    does, the first one's are shown. Of the lengths up to which those with budget "auto" kept everything it is
    the shortest.
    """
    first, *others = results
    if not others:
        return first
    added = first.copy()
    added.pop("switches", None)  # each has its own
    for other in others:
        for count in ("compactions", "evicted_tokens", "peak_pages", "pages_without_compaction"):
            added[count] += other[count]
        added["sequences"] = added.get("sequences", 1) + other.get("sequences", 1)
        if "full_cache_tokens" in other:
            length = other["full_cache_tokens"]
            added["full_cache_tokens"] = min(added.get("full_cache_tokens", length), length)
    if added["compactions"]:
        added["reason"] = None
    return added
