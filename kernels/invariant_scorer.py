"""Policy ``invariant``'s scores in a round, linear in the length of the cache (rkv_spec 4).

Three walks over the keys, then tables of one number a token. The floor is one reading of the keys; there are
three, since directions need the mean of all features, and redundancy the mean of all directions.
"""

from __future__ import annotations

from typing import Any

import torch

from .batch import CompactionBatch
from .cache_layout import PagedKV
from .invariant_attention import attention_and_directions
from .invariant_redundancy import invariant_redundancy
from .invariant_statistics import query_statistics
from .query_capture import check_queries
from .rotary_pairs import RotaryPairs
from .scorer import check_factors, check_pool_kernel, check_weights
from .span_records import SpanRecords
from .standard_scores import standard_scores
from .work_slice import WorkSlice


class InvariantScorer:
    """Log-importance against invariant redundancy; reference: ``naive_invariant.invariant_scores``."""

    def __init__(
        self,
        queries: torch.Tensor,
        factors: torch.Tensor,
        lam: torch.Tensor,
        *,
        pairs: RotaryPairs,
        pool_kernel: int = 3,
    ) -> None:
        """
        Args:
            queries: [L, rows, ring, Hq, D], the query ring, on the cache's device and in its dtype, or in any
                where the cache holds FP8.
            factors: float32 [L, H], what makes attention logits of products of queries and stored keys.
            lam: float32 [R], weight of importance of each request, 0 to 1.
            pairs: how the model's rotary embedding pairs a head's dimensions.
            pool_kernel: odd width, in tokens, of the max-pooling of importance.

        Raises:
            ValueError: a setting is out of range.
        """
        check_pool_kernel(pool_kernel)
        self._queries = queries
        self._factors = factors
        self._lam = lam
        self._pairs = pairs
        self._pool_kernel = pool_kernel

    def check(self, kv: PagedKV, batch: CompactionBatch, window: int) -> None:
        """See ``Scorer.check``."""
        check_queries(self._queries, kv, at_least=1)
        check_factors(self._factors, kv)
        check_weights(self._lam, kv, batch)
        if self._pairs.rotated > kv.head_size or self._pairs.rotated % 2:
            raise ValueError(f"{self._pairs.rotated} rotated dimensions do not fit head size {kv.head_size}")

    def score(self, work: WorkSlice, scores: torch.Tensor, window: int) -> None:
        """See ``Scorer.score``."""
        records = SpanRecords.of(work.kv, self._queries, self._pairs)
        of_keys: dict[str, Any] = {"pairs": self._pairs, "window": window}
        for part in range(records.parts):
            query_statistics(work, self._queries, self._factors, records, part, **of_keys)
            attention_and_directions(work, self._queries, self._factors, records, part, **of_keys)
        invariant_redundancy(work, records, **of_keys)
        standard_scores(work, self._lam, scores, window=window, pool_kernel=self._pool_kernel)
