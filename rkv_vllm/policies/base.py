"""What a selection policy is given and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from rkv_vllm.kernels.rotary_pairs import UNROTATED, RotaryPairs
from rkv_vllm.settings.config import WINDOW, RkvConfig

#: Most elements of the keys that a policy reads at a time where a whole layer's may not fit beside the cache.
_ELEMENTS_IN_BLOCK = 2**21


class Keys(Protocol):
    """A tensor [H, N, D], or what reads parts of one when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, index: tuple[slice, slice], /) -> torch.Tensor:
        """Some heads and tokens: [h, n, D]."""


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """One layer of one request at a compaction.

    Attributes:
        keys: [H, N, D], the cached keys after rotary embedding, survivors of an earlier round in the server's
            order and then all later ones in temporal order.
        queries: [Hq, n, D], the newest tokens' queries after rotary embedding, in any order: as many as the
            policy looks at, or the buffer is long; None where it looks at none.
        scale: what makes attention logits of products of queries and keys; of no use without queries.
        layer: index of the layer.
        logical_length: tokens of the request so far.
        num_previous_survivors: slots at the front that the round before has filled, its window the last of
            them; 0 for the first round.
        protected: first slots, which stay whatever their scores.
        rotary_pairs: how the model's rotary embedding pairs a head's dimensions.
    """

    keys: Keys
    queries: torch.Tensor | None
    scale: float
    layer: int
    logical_length: int
    num_previous_survivors: int = 0
    protected: int = 0
    rotary_pairs: RotaryPairs = UNROTATED

    @property
    def num_candidates(self) -> int:
        return self.keys.shape[1] - WINDOW

    def key_blocks(self) -> Iterator[torch.Tensor]:
        """All keys in order, [H, n, D] at a time; n depends on the shape of the keys alone."""
        heads, tokens, size = self.keys.shape
        step = max(_ELEMENTS_IN_BLOCK // (heads * size), 1)
        for start in range(0, tokens, step):
            yield self.keys[:, start : start + step]


class Policy(Protocol):
    """Scores the candidates: all cached tokens but the newest `WINDOW`, which are always kept."""

    @classmethod
    def from_config(cls, config: RkvConfig, weight: float | None) -> Self:
        """
        Args:
            config: the server's settings.
            weight: of importance against redundancy; None: the policy does not weigh them.
        """

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        """Returns: float32 [H, N - WINDOW]; the highest are kept, of equals the older."""
