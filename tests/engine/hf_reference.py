"""Compacted generation by transformers and the float64 reference, without any of the engine's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from rkv_vllm.kernels import naive

#: R-KV's published constants, written out here on purpose rather than taken from the package.
WINDOW, POOL_KERNEL, MIX_LAMBDA, SIMILARITY, SINKS = 8, 7, 0.1, 0.5, 4

_ATTENTION = "eager_with_queries_kept"


@dataclass(frozen=True)
class Teaching:
    """Log-probabilities of a teacher-forced run.

    Attributes:
        logprobs: [generated tokens, vocabulary]; row i: prediction of the i-th generated token.
        compacted_at: logical lengths at which the cache was compacted.
    """

    logprobs: torch.Tensor
    compacted_at: list[int]


class HfReference:
    """The model in float32 with eager attention, its cache compacted per layer and per KV head."""

    def __init__(self, model: Path) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=_ATTENTION
        ).eval()
        self._newest_queries: dict[int, torch.Tensor] = {}

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """Eager attention that keeps each layer's newest rotated queries, [Hq, WINDOW, D]."""
        earlier = self._newest_queries.get(module.layer_idx, query[0, :, :0])
        self._newest_queries[module.layer_idx] = torch.cat([earlier, query[0]], dim=1)[:, -WINDOW:]
        return eager_attention_forward(module, query, key, value, mask, **kwargs)

    @torch.inference_mode()
    def teach(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        *,
        budget: int,
        buffer: int,
        policy: Literal["rkv", "recency"],
    ) -> Teaching:
        """Feeds prompt and tokens, compacting whenever budget + buffer slots are full in decode."""
        self._newest_queries.clear()
        cache = DynamicCache()
        fed = [*prompt, *tokens[:-1]]
        done, evicted = len(prompt), 0
        logits = [self._feed(fed[:done], 0, cache)[-1:]]
        compacted_at = []
        while done < len(fed):
            if done - evicted >= budget + buffer:
                for layer in range(len(cache.layers)):
                    self._compact(cache.layers[layer], layer, budget, policy)
                evicted = done - budget
                compacted_at.append(done)
            end = min(len(fed), evicted + budget + buffer)
            logits.append(self._feed(fed[done:end], done, cache))
            done = end
        return Teaching(torch.cat(logits).log_softmax(dim=-1), compacted_at)

    def _feed(self, tokens: Sequence[int], position: int, cache: DynamicCache) -> torch.Tensor:
        """Logits [tokens, vocabulary] of tokens at their logical positions, over whatever the cache holds."""
        cached, count = cache.get_seq_length(), len(tokens)
        # Causal over slots: everything cached, and of the new tokens those up to oneself.
        mask = torch.full((count, cached + count), torch.finfo(torch.float32).min).triu(diagonal=cached + 1)
        output = self._model(
            input_ids=torch.tensor([tokens]),
            attention_mask=mask[None, None],
            position_ids=torch.arange(position, position + count)[None],
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[0]

    def _compact(self, layer_cache: Any, layer: int, budget: int, policy: str) -> None:
        keys, values = layer_cache.keys[0], layer_cache.values[0]  # [H, N, D]
        heads, length, _ = keys.shape
        if policy == "recency":
            age = torch.arange(length - WINDOW, dtype=torch.float64)
            age[:SINKS] = length
            scores = age.expand(heads, -1)
        else:
            scores = naive.rkv_scores(
                self._newest_queries[layer].double(),
                keys.double(),
                window=WINDOW,
                lam=MIX_LAMBDA,
                threshold=SIMILARITY,
                pool_kernel=POOL_KERNEL,
            )
        kept = naive.kept_indices(scores, budget, length)
        layer_cache.keys = naive.compact(keys, kept)[None]
        layer_cache.values = naive.compact(values, kept)[None]
