"""Reference of policy ``invariant``'s scores for one layer of one request (rkv_spec 4).

It follows the formulas step by step, keeps the whole N x N similarity matrix, and computes in float64 when
it is given float64 tensors (in float32 otherwise).
"""

from __future__ import annotations

import torch

from .naive import compute_dtype
from .rotary_pairs import RotaryPairs


def redundancy(keys: torch.Tensor, pairs: RotaryPairs, *, eps: float = 1e-8) -> torch.Tensor:
    """How much each key's features resemble those of all keys, wherever they stand (rkv_spec 4.1 and 4.2).

    Args:
        keys: [H, N, D], all cached keys, window included.
        pairs: how the model's rotary embedding pairs their dimensions.
        eps: added to each centred feature vector's Euclidean norm.

    Returns:
        [H, N], each key's mean cosine similarity to all, itself included; float64 for float64 keys and
        float32 otherwise.
    """
    features = pairs.features(keys.to(compute_dtype(keys)))
    centred = features - features.mean(dim=1, keepdim=True)
    units = centred / (centred.norm(dim=-1, keepdim=True) + eps)
    return (units @ units.transpose(-1, -2)).mean(dim=-1)


def importance(
    queries: torch.Tensor, keys: torch.Tensor, *, window: int, pool_kernel: int, scale: float
) -> torch.Tensor:
    """Attention to each candidate key, the mean over query heads and queries (rkv_spec 4.3).

    Args:
        queries: [Hq, n, D], the newest queries after rotary embedding; their order does not matter.
        keys: [H, N, D], cached keys, oldest first; query head ``h * G + g`` reads key head ``h``.
        window: number of newest keys that are no candidates.
        pool_kernel: odd width, in tokens, of the max-pooling along the keys.
        scale: factor on the logits.

    Returns:
        [H, N - window], float64 for float64 keys and float32 otherwise.
    """
    heads, length, _ = keys.shape
    dtype = compute_dtype(keys)
    grouped = queries.to(dtype).unflatten(0, (heads, -1))  # [H, G, n, D]
    logits = torch.einsum("hgtd,hnd->hgtn", grouped, keys[:, : length - window].to(dtype)) * scale
    attention = logits.softmax(dim=-1).mean(dim=(1, 2))
    return torch.nn.functional.max_pool1d(attention, pool_kernel, stride=1, padding=pool_kernel // 2)


def standard_scores(values: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Each row less its mean, over its standard deviation (rkv_spec 4.4).

    Args:
        values: [..., n].
        eps: added to the standard deviation.
    """
    centred = values - values.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True).sqrt() + eps)


def invariant_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    pairs: RotaryPairs,
    *,
    window: int,
    lam: float,
    pool_kernel: int,
    scale: float,
) -> torch.Tensor:
    """Standard score of log-importance against that of redundancy (rkv_spec 4.4).

    Args:
        queries: [Hq, n, D].
        keys: [H, N, D].
        pairs: how the model's rotary embedding pairs their dimensions.
        window: number of newest keys that are no candidates.
        lam: weight of importance, 0 to 1.
        pool_kernel: odd width, in tokens, of the max-pooling of importance.
        scale: factor on the attention logits.

    Returns:
        [H, N - window]; float64 for float64 keys and float32 otherwise.
    """
    important = importance(queries, keys, window=window, pool_kernel=pool_kernel, scale=scale)
    redundant = redundancy(keys, pairs)[:, : keys.shape[1] - window]
    log_importance = (important + 1e-9).log()
    return lam * standard_scores(log_importance) - (1.0 - lam) * standard_scores(redundant)
