"""One whole compaction round on the device: score, select, move."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .batch import CompactionBatch
from .cache_layout import PagedKV
from .importance import window_statistics
from .joint_scores import MASS_SCALE, combine
from .matches import newest_matches
from .move import compact
from .options import Order, Scope
from .scratch import ScratchMemory
from .select import SELECT_LENGTHS, select
from .shared_scores import add_layers, share_in_layer
from .window_sums import attention_and_link_sums
from .work_slice import WorkSlice


class RkvRound:
    """Runs compaction rounds over one cache, in scratch memory that it allocates once.

    A call only enqueues work on the current stream: it never waits for the device, and the device memory
    that it uses does not grow with time. The current device must be the cache's. The scratch memory is not
    shared between streams: one instance a stream.

    Attributes:
        kv: the cache.
        window: newest tokens, always kept, whose queries give importance.
        threshold: cosine similarity above which two keys count as duplicates.
        pool_kernel: odd width, in tokens, of the max-pooling of importance.
        scale: factor on the attention logits.
        scope: who shares one set of kept tokens.
    """

    def __init__(
        self,
        kv: PagedKV,
        *,
        window: int = 8,
        threshold: float = 0.5,
        pool_kernel: int = 7,
        scale: float | None = None,
        scope: Scope = "head",
        scratch_bytes: int = 64 * 2**20,
        longest: int = 0,
    ) -> None:
        """Allocate the scratch memory.

        Args:
            kv: the cache; float32, float16 or bfloat16.
            window: 1 to 16 tokens.
            threshold: 0 to 1.
            pool_kernel: odd and positive.
            scale: ``1 / sqrt(D)`` when None.
            scope: who shares one set of kept tokens.
            scratch_bytes: device memory for everything that a round keeps for itself.
            longest: physical length of the longest request, in tokens, for one layer of which there is more
                memory if need be; 0: not known, and rounds of what does not fit are refused.

        Raises:
            ValueError: a setting is out of range, or the cache's dtype or head size is not supported.
        """
        if kv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"keys of {kv.dtype} cannot be scored: float32, float16 or bfloat16 are needed")
        if kv.head_size > 256:
            raise ValueError(f"head size {kv.head_size} is above 256")
        if not 1 <= window <= 16:
            raise ValueError(f"window must be 1 to 16, not {window}")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be 0 to 1, not {threshold}")
        if pool_kernel < 1 or pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be odd and positive, not {pool_kernel}")
        self.kv = kv
        self.window = window
        self.threshold = threshold
        self.pool_kernel = pool_kernel
        self.scale = 1.0 / math.sqrt(kv.head_size) if scale is None else scale
        self.scope = scope
        self.scratch = ScratchMemory(
            kv,
            window=window,
            shares_all_layers=scope == "global",
            num_bytes=scratch_bytes,
            longest=longest,
        )

    def run(self, queries: torch.Tensor, batch: CompactionBatch, lam: torch.Tensor) -> None:
        """Score every token of the batch, select the survivors, and move them into the target pages.

        Args:
            queries: [L, rows, window, Hq, D], the ring of window queries, in the cache's dtype and on its
                device.
            batch: the requests; afterwards the first ``keep`` slots of the target pages hold each request.
            lam: float32 [R], weight of importance of each request: 1 scores by importance alone.

        Raises:
            ValueError: shapes, dtypes or devices do not fit, a request keeps fewer tokens than the window, a
                page does not exist, or the scratch memory does not hold one layer of the longest request.
                Nothing has been moved then.
        """
        self._check(batch, queries, lam)
        self._run(batch, partial(self._score_in_scratch, queries, lam))

    def select_and_move(self, scores_of_layer: Callable[[int], torch.Tensor], batch: CompactionBatch) -> None:
        """Select by given scores and move the survivors, for policies that score elsewhere.

        Args:
            scores_of_layer: takes a layer and gives float32 [R, H, >= longest length - window]; asked for one
                layer after the other, so that only one layer's scores lie beside the scratch memory. What
                is behind a request's candidates is not looked at. NaN counts as the lowest score; ties go
                to the lower slot.
            batch: the requests.

        Raises:
            ValueError: as ``run``.
        """
        self._check(batch)
        self._run(batch, partial(self._put_into_scratch, scores_of_layer))

    def score(
        self, queries: torch.Tensor, batch: CompactionBatch, lam: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Write each head's own joint scores, by which ``run`` selects, and move nothing.

        Args:
            queries: as in ``run``.
            batch: the requests.
            lam: as in ``run``.
            scores: float32 [L, R, H, >= longest length - window], last stride 1, written in place up to each
                request's candidates.

        Raises:
            ValueError: as ``run``.
        """
        self._check(batch, queries, lam)
        _check_scores(self.kv, self.window, scores, batch, layers=self.kv.num_layers)
        for work in self.slices(batch):
            self._score(work, queries, lam, _of_slice(scores, work))

    def page_scores(self, queries: torch.Tensor, batch: CompactionBatch, lam: torch.Tensor) -> torch.Tensor:
        """Importance and redundancy of whole pages, summed over their candidates, all layers and KV heads.

        Args:
            queries: as in ``run``.
            batch: the requests; what they keep and their target pages do not matter.
            lam: as in ``run``.

        Returns:
            float32 [R, P_src, 2]: importance, then redundancy (0 for requests with a ``lam`` of 1); 0 behind
            a request's candidates.

        Raises:
            ValueError: as ``run``.
        """
        self._check(batch, queries, lam)
        shape = (*batch.source_pages.shape, 2)
        masses = torch.zeros(shape, dtype=torch.int64, device=self.kv.device)
        for work in self.slices(batch):
            self._score(work, queries, lam, work.scores_by_head, masses)
        return masses.float().div_(MASS_SCALE)

    def warm_up(self, queries: torch.Tensor, order: Order = "temporal") -> None:
        """Compile and run every kernel once, on the first slots of page 0, whose contents stay as they are.

        Args:
            queries: the ring of window queries that later rounds will be given.
            order: that of later rounds.
        """
        length = self.window + 1
        batch = CompactionBatch.build(
            lengths=[length],
            keeps=[length],
            source_pages=[list(range(-(-length // self.kv.page_size)))],
            target_pages=[list(range(-(-length // self.kv.page_size)))],
            query_rows=[0],
            page_size=self.kv.page_size,
            device=self.kv.device,
            order=order,
        )
        staged = dataclasses.replace(
            batch, staged=[0], staged_on_device=torch.ones_like(batch.staged_on_device)
        )
        lam = torch.full((1,), 0.5, dtype=torch.float32, device=self.kv.device)
        self.page_scores(queries, batch, lam)
        for each in (batch, staged):
            self.run(queries, each, lam)
        work = next(self.slices(batch))
        for longest in SELECT_LENGTHS:
            select(dataclasses.replace(work, longest=longest), work.scores_by_head, window=self.window)

    def _run(self, batch: CompactionBatch, scores_of: Callable[[WorkSlice], torch.Tensor]) -> None:
        """Score, select and move, slice by slice; what all layers share needs all scores first."""
        for slices in self.scratch.slices(batch):
            if self.scope == "global":
                for work in slices:
                    add_layers(work, scores_of(work), window=self.window)
            for work in slices:
                if self.scope == "global":
                    scores = work.shared.view(1, work.requests, 1, work.capacity)
                    scores = scores.expand(work.layers, -1, self.kv.num_heads, -1)
                else:
                    scores = scores_of(work)
                    if self.scope == "layer":
                        scores = share_in_layer(work, scores, window=self.window)
                select(work, scores, window=self.window)
                compact(work, window=self.window)

    def _put_into_scratch(
        self, scores_of_layer: Callable[[int], torch.Tensor], work: WorkSlice
    ) -> torch.Tensor:
        last_request = work.first_request + work.requests
        for index, scratch in enumerate(work.scores_by_head):
            scores = scores_of_layer(work.first_layer + index)
            _check_scores(self.kv, self.window, scores.unsqueeze(0), work.batch, layers=1)
            given = scores[work.first_request : last_request, :, : work.longest]
            scratch[:, :, : given.shape[2]] = given
        return work.scores_by_head

    def _score_in_scratch(self, queries: torch.Tensor, lam: torch.Tensor, work: WorkSlice) -> torch.Tensor:
        self._score(work, queries, lam, work.scores_by_head)
        return work.scores_by_head

    def _score(
        self,
        work: WorkSlice,
        queries: torch.Tensor,
        lam: torch.Tensor,
        scores: torch.Tensor,
        masses: torch.Tensor | None = None,
    ) -> None:
        window_statistics(work, queries, scale=self.scale)
        newest_matches(work, lam, threshold=self.threshold)
        attention_and_link_sums(work, queries, lam, scale=self.scale)
        combine(work, lam, scores, window=self.window, pool_kernel=self.pool_kernel, masses=masses)

    def slices(self, batch: CompactionBatch) -> Iterator[WorkSlice]:
        """The slices that the batch is cut into, one after the other in the same scratch memory."""
        for slices in self.scratch.slices(batch):
            yield from slices

    def _check(
        self, batch: CompactionBatch, queries: torch.Tensor | None = None, lam: torch.Tensor | None = None
    ) -> None:
        kv = self.kv
        if min(batch.keeps) < self.window:
            raise ValueError(
                f"a request keeps {min(batch.keeps)} tokens, fewer than the window of {self.window}"
            )
        if any(keep - self.window < first for keep, first in zip(batch.keeps, batch.protects, strict=True)):
            raise ValueError("a request protects more tokens than it keeps beside the window")
        if batch.highest_page >= kv.num_pages:
            raise ValueError(f"page {batch.highest_page} does not exist: the cache has {kv.num_pages}")
        self.scratch.check(max(batch.lengths))
        if queries is not None:
            expected = (kv.num_layers, self.window, kv.head_size)
            if queries.dim() != 5 or (queries.shape[0], queries.shape[2], queries.shape[4]) != expected:
                raise ValueError(
                    f"window queries of shape {tuple(queries.shape)} do not fit {kv.num_layers} layers, "
                    f"a window of {self.window} and head size {kv.head_size}"
                )
            if queries.shape[3] % kv.num_heads or not 1 <= queries.shape[3] // kv.num_heads <= 16:
                raise ValueError(f"{queries.shape[3]} query heads do not fit {kv.num_heads} KV heads")
            if queries.dtype != kv.dtype or queries.device != kv.device or queries.stride(4) != 1:
                raise ValueError(f"window queries must be contiguous {kv.dtype} on {kv.device}")
        if lam is not None and (
            lam.shape != (batch.num_requests,) or lam.dtype != torch.float32 or lam.device != kv.device
        ):
            raise ValueError(f"lam must be float32 [{batch.num_requests}] on {kv.device}")


def _of_slice(scores: torch.Tensor, work: WorkSlice) -> torch.Tensor:
    return scores[
        work.first_layer : work.first_layer + work.layers,
        work.first_request : work.first_request + work.requests,
    ]


def _check_scores(
    kv: PagedKV, window: int, scores: torch.Tensor, batch: CompactionBatch, *, layers: int
) -> None:
    requests, heads = batch.num_requests, kv.num_heads
    enough = scores.dim() == 4 and scores.shape[3] >= max(batch.lengths) - window
    if not enough or scores.shape[:3] != (layers, requests, heads):
        raise ValueError(f"scores of shape {tuple(scores.shape)} do not fit the batch")
    if scores.dtype != torch.float32 or scores.device != kv.device or scores.stride(3) != 1:
        raise ValueError(f"scores must be float32 on {kv.device}, contiguous along the slots")
