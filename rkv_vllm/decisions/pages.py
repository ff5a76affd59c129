"""Pages and slots (pure)."""

from __future__ import annotations


def num_pages(slots: int, page_size: int) -> int:
    """Pages that hold `slots` tokens, the last one perhaps in part."""
    return -(-slots // page_size)
