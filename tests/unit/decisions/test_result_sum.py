"""One result out of several."""

from __future__ import annotations

from typing import Any

from rkv_vllm.decisions.messages import CompactionResult
from rkv_vllm.decisions.result_sum import combined

ONE = CompactionResult(
    budget=256,
    buffer=128,
    policy="rkv",
    compactions=5,
    evicted_tokens=640,
    peak_pages=12,
    pages_without_compaction=29,
    page_size=32,
    reason=None,
)


def test_numbers_are_added_up() -> None:
    """Proves that settings and page size stay, and that a reason stays only where nothing was compacted."""
    short: Any = {**ONE, "compactions": 0, "reason": "short"}
    sums = {"evicted_tokens": 1280, "peak_pages": 24, "pages_without_compaction": 58, "sequences": 2}
    assert combined([short, ONE]) == {**ONE, **sums}
    assert combined([short, short]) == {**short, **sums}
    assert short == {**ONE, "compactions": 0, "reason": "short"}, "what was added up is as it was"


def test_sums_may_be_added_up_again() -> None:
    """Proves that several prompts with several answers each count every answer once."""
    assert combined([combined([ONE, ONE]), ONE]) == combined([ONE, ONE, ONE])
    assert combined([ONE, ONE, ONE]).get("sequences") == 3
    assert combined([ONE]) == ONE
