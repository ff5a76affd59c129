"""One whole compaction round on the device: score, select, move."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from .batch import CompactionBatch, QueryWindow
from .cache_layout import FP8, PLAIN, PagedKV
from .move import compact
from .options import Order, Scope
from .page_sums import SUM_SCALE, add_page_sums
from .scorer import Scorer, check_scores
from .scratch import ScratchMemory
from .select import SELECT_LENGTHS, select
from .shared_scores import add_layers, share_in_layer
from .work_slice import WorkSlice


class CompactionRound:
    """Runs compaction rounds over one cache, in scratch memory that it allocates once.

    A call only enqueues work on the current stream: it never waits for the device, and the device memory
    that it uses does not grow with time. The current device must be the cache's. The scratch memory is not
    shared between streams: one instance a stream.

    Attributes:
        kv: the cache.
        window: newest tokens, always kept.
        scope: who shares one set of kept tokens.
    """

    def __init__(
        self,
        kv: PagedKV,
        *,
        window: int = 8,
        scope: Scope = "head",
        scratch_bytes: int = 64 * 2**20,
        longest: int = 0,
    ) -> None:
        """Allocate the scratch memory.

        Args:
            kv: the cache; float32, float16, bfloat16, or FP8.
            window: 1 to 16 tokens.
            scope: who shares one set of kept tokens.
            scratch_bytes: device memory for everything that a round keeps for itself.
            longest: physical length of the longest request, in tokens, for one layer of which there is more
                memory if need be; 0: not known, and rounds of what does not fit are refused.

        Raises:
            ValueError: a setting is out of range, or the cache's dtype or head size is not supported.
        """
        if kv.dtype not in (*PLAIN, *FP8):
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*PLAIN, *FP8))
            raise ValueError(f"keys of {kv.dtype} cannot be scored: only {known} can")
        if kv.head_size > 256:
            raise ValueError(f"head size {kv.head_size} is above 256")
        if not 1 <= window <= 16:
            raise ValueError(f"window must be 1 to 16, not {window}")
        self.kv = kv
        self.window = window
        self.scope = scope
        self.scratch = ScratchMemory(
            kv,
            window=window,
            shares_all_layers=scope == "global",
            num_bytes=scratch_bytes,
            longest=longest,
        )

    def run(self, scorer: Scorer, batch: CompactionBatch) -> None:
        """Score every token of the batch, select the survivors, and move them into the target pages.

        Args:
            scorer: of all its requests; ties go to the lower slot.
            batch: the requests; afterwards the first ``keep`` slots of the target pages hold each request.

        Raises:
            ValueError: the scorer refuses the batch, a request keeps fewer tokens than the window, a page
                does not exist, or the scratch memory does not hold one layer of the longest request.
                Nothing has been moved then.
        """
        self._check(scorer, batch)
        for slices in self.scratch.slices(batch):
            if self.scope == "global":  # what all layers share needs all scores first
                for work in slices:
                    add_layers(work, self._scores(scorer, work), window=self.window)
            for work in slices:
                if self.scope == "global":
                    scores = work.shared.view(1, work.requests, 1, work.capacity)
                    scores = scores.expand(work.layers, -1, self.kv.num_heads, -1)
                else:
                    scores = self._scores(scorer, work)
                    if self.scope == "layer":
                        scores = share_in_layer(work, scores, window=self.window)
                self._select(work, scores)
                compact(work, window=self.window)

    def score(self, scorer: Scorer, batch: CompactionBatch, scores: torch.Tensor) -> None:
        """Write each head's own scores, by which ``run`` selects, and move nothing.

        Args:
            scorer: of all its requests.
            batch: the requests.
            scores: float32 [L, R, H, >= longest length - window], last stride 1, written in place up to each
                request's candidates.

        Raises:
            ValueError: as ``run``.
        """
        self._check(scorer, batch)
        check_scores(scores, self.kv, batch, self.window, layers=self.kv.num_layers)
        for work in self.slices(batch):
            scorer.score(work, _of_slice(scores, work), self.window)

    def page_scores(self, scorer: Scorer, batch: CompactionBatch) -> torch.Tensor:
        """Scores of whole pages: sums over their candidates, all layers and KV heads.

        Args:
            scorer: of all its requests.
            batch: the requests; what they keep and their target pages do not matter.

        Returns:
            float32 [R, P_src]; 0 behind a request's candidates.

        Raises:
            ValueError: as ``run``.
        """
        self._check(scorer, batch)
        sums = torch.zeros(batch.source_pages.shape, dtype=torch.int64, device=self.kv.device)
        for work in self.slices(batch):
            self._scores(scorer, work)
            add_page_sums(work, sums, window=self.window)
        return sums.float().div_(SUM_SCALE)

    def warm_up(self, scorers: Sequence[Scorer], order: Order = "temporal") -> None:
        """Compile and run every kernel once, on the first slots of page 0, whose contents stay as they are.

        Args:
            scorers: one of each kind that later rounds will use, for one request with row 0 of the ring.
            order: that of later rounds.
        """
        length = self.window + 1
        pages = [list(range(-(-length // self.kv.page_size)))]
        batch = CompactionBatch.build(
            lengths=[length],
            keeps=[length],
            source_pages=pages,
            target_pages=pages,
            queries=[QueryWindow(row=0, end=self.window, num=self.window)],
            page_size=self.kv.page_size,
            device=self.kv.device,
            order=order,
        )
        staged = dataclasses.replace(
            batch, staged=[0], staged_on_device=torch.ones_like(batch.staged_on_device)
        )
        for scorer in scorers:
            self.page_scores(scorer, batch)
            for each in (batch, staged):
                self.run(scorer, each)
        work = next(self.slices(batch))
        for longest in SELECT_LENGTHS:
            select(dataclasses.replace(work, longest=longest), work.scores_by_head, window=self.window)

    def slices(self, batch: CompactionBatch) -> Iterator[WorkSlice]:
        """The slices that the batch is cut into, one after the other in the same scratch memory."""
        for slices in self.scratch.slices(batch):
            yield from slices

    def _select(self, work: WorkSlice, scores: torch.Tensor) -> None:
        select(work, scores, window=self.window)

    def _scores(self, scorer: Scorer, work: WorkSlice) -> torch.Tensor:
        scorer.score(work, work.scores_by_head, self.window)
        return work.scores_by_head

    def _check(self, scorer: Scorer, batch: CompactionBatch) -> None:
        if min(batch.keeps) < self.window:
            raise ValueError(
                f"a request keeps {min(batch.keeps)} tokens, fewer than the window of {self.window}"
            )
        if any(keep - self.window < first for keep, first in zip(batch.keeps, batch.protects, strict=True)):
            raise ValueError("a request protects more tokens than it keeps beside the window")
        if batch.highest_page >= self.kv.num_pages:
            raise ValueError(f"page {batch.highest_page} does not exist: the cache has {self.kv.num_pages}")
        self.scratch.check(max(batch.lengths))
        scorer.check(self.kv, batch, self.window)


def _of_slice(scores: torch.Tensor, work: WorkSlice) -> torch.Tensor:
    return scores[
        work.first_layer : work.first_layer + work.layers,
        work.first_request : work.first_request + work.requests,
    ]
