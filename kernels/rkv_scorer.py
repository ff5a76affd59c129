"""R-KV's scores, and those of importance alone, in three passes over the keys (rkv_spec 1.2 to 1.4)."""

from __future__ import annotations

import torch

from .batch import CompactionBatch
from .cache_layout import PagedKV
from .importance import window_statistics
from .joint_scores import combine
from .matches import newest_matches
from .query_capture import check_queries
from .scorer import check_factors, check_pool_kernel, check_weights
from .window_sums import attention_and_link_sums
from .work_slice import WorkSlice


class RkvScorer:
    """``lam`` times importance, less ``1 - lam`` times redundancy; reference: ``naive.rkv_scores``."""

    def __init__(
        self,
        queries: torch.Tensor,
        factors: torch.Tensor,
        lam: torch.Tensor,
        *,
        threshold: float = 0.5,
        pool_kernel: int = 7,
    ) -> None:
        """
        Args:
            queries: [L, rows, ring, Hq, D], the query ring, on the cache's device and in its dtype, or in any
                where the cache holds FP8; those of the window's tokens are looked at.
            factors: float32 [L, H], what makes attention logits of products of queries and stored keys.
            lam: float32 [R], weight of importance of each request: 1 scores by importance alone.
            threshold: cosine similarity above which two keys count as duplicates, 0 to 1.
            pool_kernel: odd width, in tokens, of the max-pooling of importance.

        Raises:
            ValueError: a setting is out of range.
        """
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be 0 to 1, not {threshold}")
        check_pool_kernel(pool_kernel)
        self._queries = queries
        self._factors = factors
        self._lam = lam
        self._threshold = threshold
        self._pool_kernel = pool_kernel

    def check(self, kv: PagedKV, batch: CompactionBatch, window: int) -> None:
        """See ``Scorer.check``."""
        check_queries(self._queries, kv, at_least=window)
        check_factors(self._factors, kv)
        check_weights(self._lam, kv, batch)

    def score(self, work: WorkSlice, scores: torch.Tensor, window: int) -> None:
        """See ``Scorer.score``."""
        window_statistics(work, self._queries, self._factors, window=window)
        newest_matches(work, self._lam, threshold=self._threshold)
        attention_and_link_sums(work, self._queries, self._factors, self._lam, window=window)
        combine(work, self._lam, scores, window=window, pool_kernel=self._pool_kernel)
