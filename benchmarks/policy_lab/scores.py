"""Scores of many requests at a time, by any constants; the references of kernels/ are the measure of them."""

from __future__ import annotations

import torch

from policy_lab.settings import InvariantSettings, RkvSettings, Settings
from rkv_vllm.kernels import tiled
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies.invariant import importance, joint_scores, redundancy


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
            grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, H, G * rows, D]
            important = importance(
                grouped.float(), keys[:, :, :-window].float(), settings.pool, keys.shape[-1] ** -0.5
            )
            redundant = (1.0 - settings.values) * redundancy(pairs.features(keys.float()))
            if settings.values:
                redundant += settings.values * redundancy(values)
            return joint_scores(important, redundant[:, :, :-window], settings.lam)
