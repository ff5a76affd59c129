"""Follows the tokens of one request through its rounds: when each left, layer by layer and head by head.

A token that left never comes back, so that one number says it all: the round in which it left. Slots are
turned into positions here, since survivors move to other slots in every round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rkv_vllm.inspection.explanation import explain

if TYPE_CHECKING:
    from rkv_vllm.decisions.messages import Compaction
    from rkv_vllm.execution.layer_groups import LayerGroup
    from rkv_vllm.policies import ScoreInputs

#: Of the shares in a `Record`, in percent, and of its matches.
NO_SHARE, NO_MATCH = 255, -1


@dataclass(frozen=True)
class Record:
    """What became of a request's tokens. Arrays are [layers, KV heads, tokens].

    Attributes:
        rounds: tokens of the request at each round.
        left: int32, the round in which a token left, from 1 on; 0: it never did.
        importance, redundancy: uint8, percent of the candidates of its head that had less of it, in the last
            round in which the token was a candidate; `NO_SHARE`: it never was one.
        match: int32, position of the newest token that was similar then; `NO_MATCH`: none was.

    None is what the policy does not look at.
    """

    rounds: tuple[int, ...]
    left: np.ndarray
    importance: np.ndarray | None
    redundancy: np.ndarray | None
    match: np.ndarray | None


class Recorder:
    """Told of every round while it records, and deaf otherwise."""

    def __init__(self) -> None:
        self._is_on = self._with_scores = False

    @contextmanager
    def recording(self, layers: int, heads: int, tokens: int, with_scores: bool) -> Iterator[None]:
        """Records the one request that runs in the block.

        Args:
            layers, heads: of the model, KV heads.
            tokens: that the request has at most.
            with_scores: whether scores are explained, which takes as long as the rounds themselves.
        """
        self._shape = (layers, heads, tokens)
        self._is_on, self._with_scores = True, with_scores
        self._rounds: list[int] = []
        self._tables: dict[str, torch.Tensor] = {}
        self._positions: dict[int, torch.Tensor] = {}
        try:
            yield
        finally:
            self._is_on = False

    @property
    def explains(self) -> bool:
        """Whether it wants to know what rounds are scored by."""
        return self._is_on and self._with_scores

    def begin(self, compaction: Compaction, group: LayerGroup) -> None:
        """A round begins in a group of layers; it counts once.

        Raises: RuntimeError where it is one that has been: a preempted request starts over.
        """
        if not self._is_on or group.place:
            return
        if self._rounds and compaction.logical_length <= self._rounds[-1]:
            raise RuntimeError("the request was preempted: give the engine more memory for its cache")
        self._rounds.append(compaction.logical_length)

    def explain(self, compaction: Compaction, layer: int, inputs: ScoreInputs) -> None:
        """What a layer of the round is scored by."""
        if not self.explains:
            return
        positions = self._in_slots(compaction, layer, inputs.keys.shape[0], inputs.keys.device)
        parts = explain(compaction.policy, inputs)
        for name, values in (("importance", parts.importance), ("redundancy", parts.redundancy)):
            if values is not None:
                table = self._table(name, torch.uint8, NO_SHARE, values.device)
                table[layer].scatter_(1, positions[:, : values.shape[1]], shares_below(values))
        if parts.match is not None:
            found = positions.gather(1, parts.match.clamp(min=0)).where(parts.match >= 0, NO_MATCH)
            table = self._table("match", torch.int32, NO_MATCH, found.device)
            table[layer].scatter_(1, positions[:, : found.shape[1]], found.int())

    def keep(self, compaction: Compaction, layer: int, kept: torch.Tensor) -> None:
        """What a layer keeps.

        Args:
            kept: int64 [H, keep], slots before the round, in the order in which they lie afterwards.
        """
        if not self._is_on:
            return
        positions = self._in_slots(compaction, layer, kept.shape[0], kept.device)
        stays = torch.zeros(positions.shape, dtype=torch.bool, device=kept.device).scatter_(1, kept, True)
        left = self._table("left", torch.int32, 0, kept.device)[layer]
        now = torch.where(stays, 0, len(self._rounds)).int()
        left.scatter_(1, positions, now)
        self._positions[layer] = positions.gather(1, kept)

    def keep_in_all_heads(self, compaction: Compaction, layer: int, kept: torch.Tensor) -> None:
        """What all heads of a layer keep: int64 [keep], as for `keep`."""
        if self._is_on:
            self.keep(compaction, layer, kept.expand(self._shape[1], -1))

    def record(self, tokens: int) -> Record:
        """What was recorded of a request whose cache has seen so many tokens in the end."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # with whatever stream the rounds ran on
        found = {name: table[:, :, :tokens].cpu().numpy() for name, table in self._tables.items()}
        nothing: np.ndarray = np.zeros((*self._shape[:2], tokens), dtype=np.int32)
        return Record(
            rounds=tuple(self._rounds),
            left=found.get("left", nothing),
            importance=found.get("importance"),
            redundancy=found.get("redundancy"),
            match=found.get("match"),
        )

    def _in_slots(self, compaction: Compaction, layer: int, heads: int, device: torch.device) -> torch.Tensor:
        """int64 [H, length]: the position of the token in each slot, before the round."""
        known = self._positions.get(layer, torch.empty((heads, 0), dtype=torch.int64, device=device))
        end = compaction.logical_length
        newer = torch.arange(end - (compaction.length - known.shape[1]), end, device=device)
        return torch.cat((known, newer.expand(heads, -1)), dim=1)

    def _table(self, name: str, dtype: torch.dtype, fill: int, device: torch.device) -> torch.Tensor:
        if name not in self._tables:
            self._tables[name] = torch.full(self._shape, fill, dtype=dtype, device=device)
        return self._tables[name]


def shares_below(values: torch.Tensor) -> torch.Tensor:
    """Of each value, the percentage of its row that is lower: uint8 in the shape of `values`, [H, n]."""
    lower = torch.searchsorted(values.sort(dim=-1).values, values.contiguous())
    return (lower * 100 // values.shape[-1]).to(torch.uint8)


def slots_of_pages(before: torch.Tensor, after: torch.Tensor, page_size: int, length: int) -> torch.Tensor:
    """Slots of the pages that stay, in their order.

    Args:
        before, after: int [pages], ids of a request's pages, in order; all of `after` are among `before`.
        page_size: tokens.
        length: slots that are filled before; the last page may be filled in part.

    Returns: int64 [slots].
    """
    places = (after[:, None] == before).int().argmax(dim=1)
    slots = places[:, None] * page_size + torch.arange(page_size, device=places.device)
    return slots.flatten()[slots.flatten() < length]
