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

from rkv_vllm.kernels import naive, naive_invariant
from rkv_vllm.kernels.rotary_pairs import RotaryPairs

#: R-KV's published constants, written out here on purpose rather than taken from the package.
WINDOW, POOL_KERNEL, MIX_LAMBDA, SIMILARITY, SINKS = 8, 7, 0.1, 0.5, 4
#: Those of policy invariant.
MOST_QUERIES, INVARIANT_POOL_KERNEL, INVARIANT_LAMBDA = 16, 3, 0.4

_ATTENTION = "eager_with_queries_kept"


@dataclass(frozen=True)
class Teaching:
    """Log-probabilities of a teacher-forced run.

    Attributes:
        logprobs: [generated tokens, vocabulary]; row i: prediction of the i-th generated token.
        compacted_at: logical lengths at which the cache was compacted.
        kept: after each of them the positions of the tokens that stayed, [layers, KV heads, tokens].
    """

    logprobs: torch.Tensor
    compacted_at: list[int]
    kept: list[torch.Tensor]

    def worst_difference(self, tokens: Sequence[int], logprobs: Sequence[float]) -> float:
        """The largest distance between these log-probabilities and those that an engine gave its tokens."""
        chosen = self.logprobs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        return (chosen - torch.tensor(logprobs)).abs().max().item()


class HfReference:
    """The model in float32 with eager attention, its cache compacted per layer and per KV head."""

    def __init__(self, model: Path) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=_ATTENTION
        ).eval()
        self._newest_queries: dict[int, torch.Tensor] = {}
        self._buffer = 0
        self._positions = torch.empty(0)  # [L, H, N]: of the tokens in the cache, in the text

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """Eager attention that keeps each layer's newest rotated queries, [Hq, MOST_QUERIES, D]."""
        earlier = self._newest_queries.get(module.layer_idx, query[0, :, :0])
        self._newest_queries[module.layer_idx] = torch.cat([earlier, query[0]], dim=1)[:, -MOST_QUERIES:]
        return eager_attention_forward(module, query, key, value, mask, **kwargs)

    @torch.inference_mode()
    def teach(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        *,
        budget: int,
        buffer: int,
        policy: Literal["rkv", "invariant", "recency"],
        page_size: int | None = None,
        scope: Literal["head", "layer", "global"] = "head",
        order: Literal["temporal", "score"] = "temporal",
        switch_at: int = 0,
        steps: Sequence[tuple[int, int]] = (),
    ) -> Teaching:
        """Feeds prompt and tokens, compacting whenever budget + buffer slots are full in decode.

        With a `page_size`, whole pages leave, of all layers and heads alike; the budget then fills two pages
        at least, and the threshold is above it. Below `switch_at` tokens nothing is compacted. With `steps`
        it comes down in those first: at so many tokens, to so many slots.
        """
        self._newest_queries.clear()
        self._buffer = buffer
        config = self._model.config
        self._positions = torch.empty(config.num_hidden_layers, config.num_key_value_heads, 0).long()
        cache = DynamicCache()
        fed = [*prompt, *tokens[:-1]]
        done, evicted = len(prompt), 0
        logits = [self._feed(fed[:done], 0, cache)[-1:]]
        compacted_at, kept = [], []
        to_come = list(steps)
        while done < len(fed):
            due = to_come[0][0] if to_come else max(evicted + budget + buffer, switch_at)
            if done >= due:
                self._locate(cache.get_seq_length(), done)
                if page_size is None:
                    keep = to_come.pop(0)[1] if to_come else budget
                    self._compact(cache, keep, policy, scope, order)
                else:
                    self._drop_pages(cache, budget, policy, page_size)
                evicted = done - cache.get_seq_length()
                compacted_at.append(done)
                kept.append(self._positions)
                due = to_come[0][0] if to_come else evicted + budget + buffer
            end = min(len(fed), due)
            logits.append(self._feed(fed[done:end], done, cache))
            done = end
        return Teaching(torch.cat(logits).log_softmax(dim=-1), compacted_at, kept)

    def _locate(self, length: int, done: int) -> None:
        """Adds the positions of the tokens since the last compaction, of `length` in the cache now."""
        newer = torch.arange(done - (length - self._positions.shape[2]), done)
        self._positions = torch.cat((self._positions, newer.expand(*self._positions.shape[:2], -1)), dim=2)

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

    def _compact(
        self,
        cache: DynamicCache,
        budget: int,
        policy: str,
        scope: Literal["head", "layer", "global"],
        order: Literal["temporal", "score"],
    ) -> None:
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # [H, N, D] each
        length = cache.get_seq_length()
        if policy == "recency":
            scores = self._ages()
        else:
            scores = torch.stack(
                [self._scores(keys, index, policy) for index, (keys, _) in enumerate(layers)]
            )
        kept = [naive.kept_indices(own, budget, length, order) for own in naive.shared_scores(scores, scope)]
        self._positions = self._positions.gather(2, torch.stack(kept))
        for layer, (keys, values), slots in zip(cache.layers, layers, kept, strict=True):
            layer.keys, layer.values = naive.compact(keys, slots)[None], naive.compact(values, slots)[None]

    def _ages(self) -> torch.Tensor:
        """[L, H, candidates]: each token's own position, the first tokens before all others."""
        ages = self._positions[:, :, :-WINDOW].double()
        ages[ages < SINKS] = torch.inf
        return ages

    def _drop_pages(self, cache: DynamicCache, budget: int, policy: str, page_size: int) -> None:
        """Keeps as many pages as the budget fills, the partly filled last one among them."""
        length = cache.get_seq_length()
        by_page: dict[int, float] = {}
        for layer, layer_cache in enumerate(cache.layers):
            scores = self._scores(layer_cache.keys[0], layer, policy)
            for page in range((length - WINDOW) // page_size):
                mean = scores[:, page * page_size : (page + 1) * page_size].mean().item()
                by_page[page] = by_page.get(page, 0.0) + mean
        drop = -(-length // page_size) - -(-budget // page_size)
        leaving = sorted(by_page, key=lambda page: (by_page[page], -page))[:drop]
        kept = torch.tensor([slot for slot in range(length) if slot // page_size not in leaving])
        self._positions = self._positions[:, :, kept]
        for layer_cache in cache.layers:
            layer_cache.keys = layer_cache.keys[:, :, kept]
            layer_cache.values = layer_cache.values[:, :, kept]

    def _scores(self, keys: torch.Tensor, layer: int, policy: str) -> torch.Tensor:
        """[H, candidates] of keys [H, N, D]."""
        heads, length, _ = keys.shape
        if policy == "recency":
            age = torch.arange(length - WINDOW, dtype=torch.float64)
            age[:SINKS] = torch.inf
            return age.expand(heads, -1)
        if policy == "invariant":
            return naive_invariant.invariant_scores(
                self._newest_queries[layer][:, -min(MOST_QUERIES, self._buffer) :].double(),
                keys.double(),
                RotaryPairs(rotated=keys.shape[-1]),
                window=WINDOW,
                lam=INVARIANT_LAMBDA,
                pool_kernel=INVARIANT_POOL_KERNEL,
                scale=keys.shape[-1] ** -0.5,
            )
        return naive.rkv_scores(
            self._newest_queries[layer][:, -WINDOW:].double(),
            keys.double(),
            window=WINDOW,
            lam=MIX_LAMBDA,
            threshold=SIMILARITY,
            pool_kernel=POOL_KERNEL,
        )
