"""What a compaction round asks of whatever scores its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .batch import CompactionBatch
from .cache_layout import PagedKV
from .work_slice import WorkSlice


class Scorer(Protocol):
    """Scores the candidates of a batch: all cached tokens but the window. The highest stay.

    A call only enqueues work on the current stream and takes no device memory that stays.
    """

    def check(self, kv: PagedKV, batch: CompactionBatch, window: int) -> None:
        """Raises: ValueError where the batch cannot be scored; nothing has been enqueued then."""

    def score(self, work: WorkSlice, scores: torch.Tensor, window: int) -> None:
        """Write the scores of one slice of the batch.

        Args:
            work: requests and layers, with scratch memory; ``work.scores`` may be what is written.
            scores: float32 [layers, requests, H, >= longest - window] of the slice, last stride 1, written up
                to each request's candidates. NaN counts as the lowest score.
            window: number of newest tokens, which have no score.
        """


class GivenScores:
    """Scores that are computed elsewhere, one layer after the other: one layer's take memory at a time."""

    def __init__(self, scores_of_layer: Callable[[int], torch.Tensor]) -> None:
        """
        Args:
            scores_of_layer: takes a layer and gives float32 [R, H, >= longest length - window]. What is
                behind a request's candidates is not looked at.
        """
        self._scores_of_layer = scores_of_layer

    def check(self, kv: PagedKV, batch: CompactionBatch, window: int) -> None:
        """See ``Scorer.check``."""

    def score(self, work: WorkSlice, scores: torch.Tensor, window: int) -> None:
        """See ``Scorer.score``.

        Raises:
            ValueError: what is given does not fit the batch.
        """
        last_request = work.first_request + work.requests
        for index, layer in enumerate(scores):
            given = self._scores_of_layer(work.first_layer + index)
            check_scores(given.unsqueeze(0), work.kv, work.batch, window, layers=1)
            given = given[work.first_request : last_request, :, : work.longest]
            layer[:, :, : given.shape[2]] = given


def check_scores(
    scores: torch.Tensor, kv: PagedKV, batch: CompactionBatch, window: int, *, layers: int
) -> None:
    """Raises: ValueError unless they are float32 [layers, R, H, >= longest length - window] of the cache."""
    requests, heads = batch.num_requests, kv.num_heads
    enough = scores.dim() == 4 and scores.shape[3] >= max(batch.lengths) - window
    if not enough or scores.shape[:3] != (layers, requests, heads):
        raise ValueError(f"scores of shape {tuple(scores.shape)} do not fit the batch")
    if scores.dtype != torch.float32 or scores.device != kv.device or scores.stride(3) != 1:
        raise ValueError(f"scores must be float32 on {kv.device}, contiguous along the slots")


def check_weights(lam: torch.Tensor, kv: PagedKV, batch: CompactionBatch) -> None:
    """Raises: ValueError unless there is one float32 weight for each request, on the cache's device."""
    if lam.shape != (batch.num_requests,) or lam.dtype != torch.float32 or lam.device != kv.device:
        raise ValueError(f"lam must be float32 [{batch.num_requests}] on {kv.device}")


def check_factors(factors: torch.Tensor, kv: PagedKV) -> None:
    """Raises: ValueError unless there is one float32 factor for each layer and KV head of the cache."""
    expected = (kv.num_layers, kv.num_heads)
    if factors.shape != expected or factors.dtype != torch.float32 or factors.device != kv.device:
        raise ValueError(f"factors must be float32 {list(expected)} on {kv.device}")
    if not factors.is_contiguous():
        raise ValueError("factors must be contiguous")


def check_pool_kernel(pool_kernel: int) -> None:
    """Raises: ValueError unless the width of a max-pooling is odd and positive."""
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel must be odd and positive, not {pool_kernel}")
