"""A model that decodes many rows in lockstep, over caches whose tokens may be chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rkv_vllm.kernels.rotary_pairs import RotaryPairs

_ATTENTION = "sdpa_with_queries_kept"
#: Newest queries that are kept of every row.
MOST_QUERIES = 32

#: Takes the newest queries [B, Hq, n, D], keys and values [B, H, N, D] of one layer; gives the slots that
#: stay, int64 [B, H, keep], in temporal order.
Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class ChosenLayer(CacheLayerMixin):
    """One layer's keys and values, in memory that is taken once."""

    is_sliding = False
    is_compileable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self.used = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self._capacity, size)
        self.values = torch.empty_like(self.keys)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, first : self.used] = key_states
        self.values[:, :, first : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def keep(self, rows: slice, kept: torch.Tensor) -> None:
        """Moves some rows' tokens at the slots [B, H, keep] to the front; `used` is not changed."""
        index = kept.unsqueeze(-1).expand(-1, -1, -1, self.keys.shape[-1])
        for tokens in (self.keys, self.values):
            tokens[rows, :, : kept.shape[2]] = tokens[rows].gather(2, index)

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_max_length(self) -> int:
        return self._capacity


class Decoder:
    """Greedy decoding, one token of every row a step.

    Attributes:
        pairs: how the model's rotary embedding pairs a head's dimensions.
        end_token: that ends an answer.
        device: where the model is.
        used: cached tokens of every row.
    """

    _layer_class = ChosenLayer

    def __init__(self, model: Path, device: str, dtype: torch.dtype) -> None:
        """Raises: OSError where there is no checkpoint."""
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=_ATTENTION)
        self._model.to(device).eval()
        config = self._model.config
        self.pairs = RotaryPairs(rotated=config.head_dim)
        self.end_token: int = config.eos_token_id
        self.device = device
        self._queries: list[torch.Tensor] = []
        self._layers: list[ChosenLayer] = []
        self._logical = 0

    @property
    def used(self) -> int:
        return self._layers[0].used

    @torch.inference_mode()
    def start(self, prompts: torch.Tensor, capacity: int) -> torch.Tensor:
        """Reads the prompts, int64 [rows, tokens]; returns each row's next token, int64 [rows]."""
        layers = self._model.config.num_hidden_layers
        self._layers = [self._layer_class(capacity) for _ in range(layers)]
        self._cache = Cache(layers=self._layers)
        self._queries = [torch.empty(0)] * layers
        self._logical = 0
        return self._feed(prompts)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads one token of each row, int64 [rows]; returns the next ones."""
        return self._feed(tokens.unsqueeze(1))

    @torch.inference_mode()
    def keep(self, budget: int, chooses: list[tuple[slice, Choose]]) -> None:
        """Leaves `budget` tokens of every layer and KV head of every row: for some rows each, who chooses."""
        for queries, layer in zip(self._queries, self._layers, strict=True):
            for rows, choose in chooses:
                keys, values = (each[rows, :, : layer.used] for each in (layer.keys, layer.values))
                layer.keep(rows, choose(queries[rows], keys, values))
            layer.used = budget

    def _feed(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        positions = torch.arange(self._logical, self._logical + count, device=tokens.device)
        output = self._model(
            input_ids=tokens,
            position_ids=positions.expand(tokens.shape[0], -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._logical += count
        next_tokens: torch.Tensor = output.logits[:, -1].argmax(dim=-1)
        return next_tokens

    def _attend(self, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._remember(module, query)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    def _remember(self, module: Any, query: torch.Tensor) -> None:
        """Keeps a layer's newest rotated queries, [rows, Hq, MOST_QUERIES, D]."""
        earlier = self._queries[module.layer_idx]
        joined = torch.cat((earlier, query), dim=2) if earlier.numel() else query
        self._queries[module.layer_idx] = joined[:, :, -MOST_QUERIES:]
