"""One whole compaction round on the device: score, select, move."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

from .cache_layout import CompactionBatch, Order, PagedKV
from .importance import survey
from .joint_scores import MASS_SCALE, combine
from .matches import newest_matches, sums
from .move import STAGED_COLUMNS, compact
from .select import SELECT_LENGTHS, select
from .shared_scores import add_layers, share_in_layer
from .work_slice import Part

Scope = Literal["head", "layer", "global"]
"""Who shares one set of kept tokens: no other KV head, the heads of a layer, or all layers."""

_ROUNDING = 128  # per-token tables hold a multiple of this many tokens
_BLOCK = 32  # fewest tokens of which a kernel keeps a record
_TOKEN_BYTES = 4 + 4 + 8 + 4  # weights, slots, links, scores


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
        self._scratch = torch.empty(scratch_bytes // 64 * 64, dtype=torch.uint8, device=kv.device)

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

    def select_and_move(self, scores: torch.Tensor, batch: CompactionBatch) -> None:
        """Select by given scores and move the survivors, for policies that score elsewhere.

        Args:
            scores: float32 [L, R, H, >= longest length - window], last stride 1; what lies behind a request's
                candidates is not read. NaN counts as the lowest score; ties go to the lower slot.
            batch: the requests.

        Raises:
            ValueError: as ``run``.
        """
        self._check(batch)
        self._check_scores(scores, batch)
        self._run(batch, partial(self._of_part, scores))

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
        self._check_scores(scores, batch)
        for part in self._all_parts(batch):
            self._score(part, queries, lam, self._of_part(scores, part))

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
        for part in self._all_parts(batch):
            self._score(part, queries, lam, self._own_scores(part), masses)
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
        part = next(self._all_parts(batch))
        for longest in SELECT_LENGTHS:
            select(dataclasses.replace(part, longest=longest), self._own_scores(part), window=self.window)

    def _run(self, batch: CompactionBatch, scores_of: Callable[[Part], torch.Tensor]) -> None:
        """Score, select and move, part by part; what all layers share needs the scores of all parts first."""
        for parts in self._parts(batch):
            if self.scope == "global":
                for part in parts:
                    add_layers(part, scores_of(part), window=self.window)
            for part in parts:
                if self.scope == "global":
                    scores = part.shared.view(1, part.requests, 1, part.capacity)
                    scores = scores.expand(part.layers, -1, self.kv.num_heads, -1)
                else:
                    scores = scores_of(part)
                    if self.scope == "layer":
                        scores = share_in_layer(part, scores, window=self.window)
                select(part, scores, window=self.window)
                compact(part, window=self.window)

    def _score_in_scratch(self, queries: torch.Tensor, lam: torch.Tensor, part: Part) -> torch.Tensor:
        scores = self._own_scores(part)
        self._score(part, queries, lam, scores)
        return scores

    def _score(
        self,
        part: Part,
        queries: torch.Tensor,
        lam: torch.Tensor,
        scores: torch.Tensor,
        masses: torch.Tensor | None = None,
    ) -> None:
        survey(part, queries, window=self.window, scale=self.scale)
        newest_matches(part, lam, threshold=self.threshold)
        sums(part, queries, lam, window=self.window, scale=self.scale)
        combine(part, lam, scores, window=self.window, pool_kernel=self.pool_kernel, masses=masses)

    def _own_scores(self, part: Part) -> torch.Tensor:
        return part.scores.view(part.layers, part.requests, self.kv.num_heads, part.capacity)

    @staticmethod
    def _of_part(scores: torch.Tensor, part: Part) -> torch.Tensor:
        return scores[
            part.first_layer : part.first_layer + part.layers,
            part.first_request : part.first_request + part.requests,
        ]

    def _all_parts(self, batch: CompactionBatch) -> Iterator[Part]:
        for parts in self._parts(batch):
            yield from parts

    def _parts(self, batch: CompactionBatch) -> Iterator[list[Part]]:
        """Parts that fit the scratch memory: some requests in one, or layer by layer one that is too long."""
        layers, first = self.kv.num_layers, 0
        while first < batch.num_requests:
            longest, last = batch.lengths[first], first + 1
            while last < batch.num_requests:
                longer = max(longest, batch.lengths[last])
                if self._layers_that_fit(longer, last + 1 - first) < layers:
                    break
                longest, last = longer, last + 1
            step = min(layers, self._layers_that_fit(longest, last - first))
            yield [
                self._part(batch, first_layer, min(step, layers - first_layer), first, last - first, longest)
                for first_layer in range(0, layers, step)
            ]
            first = last

    def _layers_that_fit(self, longest: int, requests: int) -> int:
        free = self._scratch.numel() - self._shared_bytes(longest, requests)
        return free // (requests * self.kv.num_heads * self._head_bytes(longest) + 1024)

    def _shared_bytes(self, longest: int, requests: int) -> int:
        """Of the scores that all layers share."""
        return 4 * requests * _capacity(longest) if self.scope == "global" else 0

    def _head_bytes(self, longest: int) -> int:
        capacity = _capacity(longest)
        return capacity * _TOKEN_BYTES + 8 * self.kv.head_size + capacity // _BLOCK * 8 * self.window

    def _part(
        self,
        batch: CompactionBatch,
        first_layer: int,
        layers: int,
        first_request: int,
        requests: int,
        longest: int,
    ) -> Part:
        capacity = _capacity(longest)
        owners = layers * requests * self.kv.num_heads
        blocks = capacity // _BLOCK
        position = 0

        def take(count: int, dtype: torch.dtype) -> torch.Tensor:
            nonlocal position
            start, position = position, position + -(-count * dtype.itemsize // 64) * 64
            return self._scratch[start : start + count * dtype.itemsize].view(dtype)

        # First, and so at the same place in all parts of a request.
        shared = take(self._shared_bytes(longest, requests) // 4, torch.float32)
        slots = take(owners * capacity, torch.int32)
        staging = self._scratch[position:].view(self.kv.dtype)
        return Part(
            kv=self.kv,
            batch=batch,
            first_layer=first_layer,
            layers=layers,
            first_request=first_request,
            requests=requests,
            longest=longest,
            capacity=capacity,
            slots=slots,
            weights=take(owners * capacity, torch.float32),
            links=take(owners * capacity, torch.int64),
            scores=take(owners * capacity, torch.float32),
            peaks=take(owners * blocks * self.window, torch.float32),
            totals=take(owners * blocks * self.window, torch.float32),
            shared=shared,
            directions=take(owners * self.kv.head_size, torch.int64),
            blocks=blocks,
            staging=staging,
        )

    def _check(
        self, batch: CompactionBatch, queries: torch.Tensor | None = None, lam: torch.Tensor | None = None
    ) -> None:
        kv = self.kv
        if min(batch.keeps) < self.window:
            raise ValueError(
                f"a request keeps {min(batch.keeps)} tokens, fewer than the window of {self.window}"
            )
        if batch.highest_page >= kv.num_pages:
            raise ValueError(f"page {batch.highest_page} does not exist: the cache has {kv.num_pages}")
        longest = max(batch.lengths)
        # Of each token's bytes in the tables, the four of its slot are not free for staging.
        free = self._scratch.numel() - self._shared_bytes(longest, 1)
        staging = free // _TOKEN_BYTES * (_TOKEN_BYTES - 4)
        if self._layers_that_fit(longest, 1) < 1 or staging < longest * STAGED_COLUMNS * kv.dtype.itemsize:
            raise ValueError(f"the scratch memory does not hold one layer of {longest} tokens")
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

    def _check_scores(self, scores: torch.Tensor, batch: CompactionBatch) -> None:
        layers, requests, heads = self.kv.num_layers, batch.num_requests, self.kv.num_heads
        enough = scores.dim() == 4 and scores.shape[3] >= max(batch.lengths) - self.window
        if not enough or scores.shape[:3] != (layers, requests, heads):
            raise ValueError(f"scores of shape {tuple(scores.shape)} do not fit the batch")
        if scores.dtype != torch.float32 or scores.device != self.kv.device or scores.stride(3) != 1:
            raise ValueError(f"scores must be float32 on {self.kv.device}, contiguous along the slots")


def _capacity(longest: int) -> int:
    """Entries of a per-token table."""
    return -(-longest // _ROUNDING) * _ROUNDING
