"""Scores of many requests at a time, by any constants; the references of kernels/ are the measure of them."""

from __future__ import annotations

import torch

from policy_lab.settings import InvariantSettings, RkvSettings, Settings
from rkv_vllm.kernels import tiled
from rkv_vllm.kernels.naive_invariant import standard_scores
from rkv_vllm.kernels.rotary_pairs import RotaryPairs


def scores(
    settings: Settings,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pairs: RotaryPairs,
    *,
    window: int,
) -> torch.Tensor:
    """The higher, the sooner a candidate stays.

    Args:
        settings: the policy and its constants.
        queries: [B, Hq, >= settings.queries, D], the newest last.
        keys: [B, H, N, D], after rotary embedding.
        values: [B, H, N, D].
        pairs: how the model's rotary embedding pairs a head's dimensions.
        window: number of newest tokens, which are no candidates.

    Returns:
        float32 [B, H, N - window].
    """
    queries = queries[:, :, -settings.queries :]
    match settings:
        case RkvSettings():
            return tiled.rkv_scores(
                queries,
                keys,
                window=window,
                lam=settings.lam,
                threshold=settings.threshold,
                pool_kernel=settings.pool,
            )
        case InvariantSettings():
            important = _importance(queries, keys[:, :, :-window], settings.pool)
            redundant = (1.0 - settings.values) * _redundancy(pairs.features(keys.float()))
            if settings.values:
                redundant += settings.values * _redundancy(values.float())
            standard = standard_scores(redundant[:, :, :-window])
            log_importance = standard_scores((important + 1e-9).log())
            return settings.lam * log_importance - (1.0 - settings.lam) * standard


def _importance(queries: torch.Tensor, candidates: torch.Tensor, pool: int) -> torch.Tensor:
    """[B, H, n]: the mean attention over query heads and queries, max-pooled."""
    heads, size = candidates.shape[1], candidates.shape[-1]
    grouped = queries.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G * rows, D]
    logits = (grouped @ candidates.transpose(-1, -2)).float() * size**-0.5
    attention = logits.softmax(dim=-1).mean(dim=2)
    return torch.nn.functional.max_pool1d(attention, pool, stride=1, padding=pool // 2)


def _redundancy(features: torch.Tensor) -> torch.Tensor:
    """[B, H, N]: the cosine of each centred feature vector [B, H, N, F] and their mean direction."""
    units = features - features.mean(dim=2, keepdim=True)
    units = units / (units.norm(dim=-1, keepdim=True) + 1e-8)
    return (units * units.mean(dim=2, keepdim=True)).sum(dim=-1)
