"""A decoder of rows that hold different numbers of tokens, each cut on a schedule of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from policy_lab.decoder import Choose, ChosenLayer, Decoder

#: Slots that are attended to come in multiples of this: attention with a mask wants it so.
_ALIGNED = 16
#: Rows that are scored at a time, which bounds the memory that takes.
_ROWS_AT_ONCE = 128


class RaggedLayer(ChosenLayer):
    """One layer's keys and values; a row's next token goes where its own tokens end."""

    def __init__(self, capacity: int) -> None:
        super().__init__(_aligned(capacity))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys.zero_()  # what is masked must be a number all the same
        self.values.zero_()

    def aim(self, slots: torch.Tensor, width: int) -> None:
        """Where the next token of each row goes, int64 [rows], and how many slots are attended to with it."""
        self._slots, self._width = slots, width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[2] > 1:  # the prompts, which are equally long
            return super().update(key_states, value_states)
        rows = torch.arange(len(self._slots), device=self._slots.device)
        self.keys[rows, :, self._slots] = key_states[:, :, 0]
        self.values[rows, :, self._slots] = value_states[:, :, 0]
        return self.keys[:, :, : self._width], self.values[:, :, : self._width]

    def cut(self, rows: torch.Tensor, length: int, queries: torch.Tensor, choose: Choose) -> None:
        """Leaves the tokens that are chosen of those rows, int64 [n], which have `length` tokens each."""
        keys, values = (each[rows, :, :length] for each in (self.keys, self.values))
        kept = choose(queries[rows], keys, values).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
        self.keys[rows, :, : kept.shape[2]] = keys.gather(2, kept)
        self.values[rows, :, : kept.shape[2]] = values.gather(2, kept)


class RaggedDecoder(Decoder):
    """Attributes:
    lengths: cached tokens of each row.
    """

    _layer_class = RaggedLayer
    _layers: list[RaggedLayer]

    def start(self, prompts: torch.Tensor, capacity: int) -> torch.Tensor:
        self.lengths = [prompts.shape[1]] * len(prompts)
        return super().start(prompts, capacity)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        slots = torch.tensor(self.lengths, device=tokens.device)
        width = _aligned(max(self.lengths) + 1)
        hidden = torch.arange(width, device=tokens.device) > slots[:, None]
        self._mask = torch.zeros(hidden.shape, dtype=self._layers[0].keys.dtype, device=tokens.device)
        self._mask.masked_fill_(hidden, float("-inf"))
        for layer in self._layers:
            layer.aim(slots, width)
        self.lengths = [length + 1 for length in self.lengths]
        return super().step(tokens)

    @torch.inference_mode()
    def cut(self, rows: Sequence[int], keep: int, choose: Choose) -> None:
        """Leaves `keep` tokens, those that are chosen, of rows that have equally many."""
        (length,) = {self.lengths[row] for row in rows}
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            some = torch.tensor(rows[first : first + _ROWS_AT_ONCE], device=self.device)
            for queries, layer in zip(self._queries, self._layers, strict=True):
                layer.cut(some, length, queries, choose)
        for row in rows:
            self.lengths[row] = keep

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if query.shape[2] > 1:
            return super()._attend(module, query, key, value, *args, **kwargs)
        self._remember(module, query)
        # The query heads of a KV head are rows of it, so that keys need not be repeated for them.
        rows = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # [B, H, G, D]
        found = F.scaled_dot_product_attention(rows, key, value, attn_mask=self._mask[:, None, None])
        return found.flatten(1, 2).unsqueeze(1), None


def _aligned(slots: int) -> int:
    return -(-slots // _ALIGNED) * _ALIGNED
