"""Policy ``invariant``'s scores in a round, linear in the length of the cache (rkv_spec 4)."""

from __future__ import annotations

import torch

from .batch import CompactionBatch
from .cache_layout import PagedKV
from .invariant_scores import invariant_scores
from .query_capture import check_queries
from .rotary_pairs import RotaryPairs
from .scorer import check_pool_kernel, check_weights
from .work_slice import WorkSlice


class InvariantScorer:
    """Log-importance against invariant redundancy; reference: ``naive_invariant.invariant_scores``."""

    def __init__(
        self,
        queries: torch.Tensor,
        lam: torch.Tensor,
        *,
        pairs: RotaryPairs,
        scale: float,
        pool_kernel: int = 3,
    ) -> None:
        """
        Args:
            queries: [L, rows, ring, Hq, D], the query ring, in the cache's dtype and on its device.
            lam: float32 [R], weight of importance of each request, 0 to 1.
            pairs: how the model's rotary embedding pairs a head's dimensions.
            scale: factor on the attention logits.
            pool_kernel: odd width, in tokens, of the max-pooling of importance.

        Raises:
            ValueError: a setting is out of range.
        """
        check_pool_kernel(pool_kernel)
        self._queries = queries
        self._lam = lam
        self._pairs = pairs
        self._scale = scale
        self._pool_kernel = pool_kernel

    def check(self, kv: PagedKV, batch: CompactionBatch, window: int) -> None:
        """See ``Scorer.check``."""
        check_queries(self._queries, kv, at_least=1)
        check_weights(self._lam, kv, batch)
        if self._pairs.rotated > kv.head_size or self._pairs.rotated % 2:
            raise ValueError(f"{self._pairs.rotated} rotated dimensions do not fit head size {kv.head_size}")

    def score(self, work: WorkSlice, scores: torch.Tensor, window: int) -> None:
        """See ``Scorer.score``."""
        invariant_scores(
            work,
            self._queries,
            self._lam,
            scores,
            pairs=self._pairs,
            window=window,
            pool_kernel=self._pool_kernel,
            scale=self._scale,
        )
