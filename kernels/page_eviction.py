"""Which pages leave, given a score for each: plain torch, the same on every device."""

from __future__ import annotations

import math

import torch

from . import naive


def choose_pages(scores: torch.Tensor, drop: int, protected: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Split pages into those that stay and those of lowest score; of equals the older stay.

    Never waits for the device.

    Args:
        scores: [pages], all of them candidates; NaN counts as the lowest score.
        drop: pages that leave, 0 to all but the protected.
        protected: first pages that stay whatever their scores.

    Returns:
        Indices that stay and indices that leave, int64, each ascending.

    Raises:
        ValueError: ``drop`` is out of range.
    """
    candidates = scores.shape[0] - protected
    if not 0 <= drop <= candidates:
        raise ValueError(f"cannot drop {drop} of {candidates} pages")
    scores = torch.where(scores.isnan(), -math.inf, scores)
    ranked = naive.protected(scores, protected).sort(descending=True, stable=True).indices
    stay = scores.shape[0] - drop
    return ranked[:stay].sort().values, ranked[stay:].sort().values


def drop_pages(row: torch.Tensor, left: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    """Close the gaps of a block table's row in place: no page is moved, only its place in the row.

    Args:
        row: int32 [pages], the ids of a request's pages in order.
        left: int64, indices of the pages that leave.
        stay: int64, indices of all others.

    Returns:
        Ids of the pages that left, in the row's dtype; what lies behind the others in ``row`` is stale.
    """
    ids = row.index_select(0, left)
    row[: stay.shape[0]] = row.index_select(0, stay)
    return ids
