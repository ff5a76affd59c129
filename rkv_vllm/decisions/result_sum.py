"""One result out of several: of the answers of a request, or of the requests behind one HTTP request."""

from __future__ import annotations

from collections.abc import Iterable

from rkv_vllm.decisions.messages import CompactionResult


def combined(results: Iterable[CompactionResult]) -> CompactionResult:
    """The sum of at least one result. `sequences` is there from two on.

    All were asked for with the same settings. Where those depend on the prompt, as a share of its length
    does, the first one's are shown.
    """
    first, *others = results
    if not others:
        return first
    added = first.copy()
    for other in others:
        for count in ("compactions", "evicted_tokens", "peak_pages", "pages_without_compaction"):
            added[count] += other[count]
        added["sequences"] = added.get("sequences", 1) + other.get("sequences", 1)
    if added["compactions"]:
        added["reason"] = None
    return added
