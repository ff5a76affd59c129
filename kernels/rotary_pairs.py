"""What of a key does not depend on its position: the lengths of its rotary pairs, and what is not rotated."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryPairs:
    """How a model's rotary embedding pairs a head's dimensions.

    Attributes:
        rotated: dimensions that are rotated, the head's first ones; even, 0 for a model without rotary
            embedding.
        interleaved: whether pairs are neighbours (2f, 2f + 1), as in GPT-J, or halves (f, f + rotated / 2),
            as in GPT-NeoX and Llama.
    """

    rotated: int
    interleaved: bool = False

    def num_features(self, head_size: int) -> int:
        """One a pair, and one a dimension that is not rotated."""
        return head_size - self.rotated // 2

    def features(self, keys: torch.Tensor) -> torch.Tensor:
        """The length of each pair, then what is not rotated as it is (rkv_spec 4.1).

        Args:
            keys: [..., D], after rotary embedding or before: it does not matter.

        Returns:
            [..., num_features(D)] in the dtype of ``keys``.
        """
        rotated, rest = keys[..., : self.rotated], keys[..., self.rotated :]
        pairs = rotated.unflatten(-1, (-1, 2) if self.interleaved else (2, -1))
        lengths = pairs.pow(2).sum(dim=-1 if self.interleaved else -2).sqrt()
        return torch.cat((lengths, rest), dim=-1)


#: Of a model without rotary embedding: every dimension is a feature.
UNROTATED = RotaryPairs(rotated=0)
