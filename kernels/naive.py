"""Reference of R-KV's scoring, selection and movement for one layer of one request.

It follows the formulas step by step, keeps the whole N x N similarity matrix, and computes in float64 when
it is given float64 tensors (in float32 otherwise). Every faster path of this package is tested against it.

Sources: R-KV (arXiv 2505.24133), sections 3.2 to 3.4, in the variant of the authors' code: keys are cached
after rotary embedding, the window's keys take work in redundancy, and each row cuts exactly one link
(rkv_spec 1.2 to 1.4 and 1.10).
"""

from __future__ import annotations

import math
from typing import Literal

import torch


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """In which the references compute: float64 for float64 tensors, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def importance(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    window: int,
    pool_kernel: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention that the newest queries pay to each candidate key (rkv_spec 1.2; paper section 3.2).

    Args:
        queries: [Hq, rows, D], the window's queries after rotary embedding; their order does not matter.
        keys: [H, N, D], cached keys, oldest first; query head ``h * G + g`` reads key head ``h``.
        window: number of newest keys that are no candidates.
        pool_kernel: odd width, in tokens, of the max-pooling along the keys.
        scale: factor on the logits; ``1 / sqrt(D)`` when None.

    Returns:
        [H, N - window], float64 for float64 keys and float32 otherwise. It sums to one before the pooling.

    Raises:
        ValueError: no candidate is left, the pooling kernel is even, or Hq is no multiple of H.
    """
    heads, length, head_size = keys.shape
    candidates = length - window
    if candidates < 1:
        raise ValueError(f"{length} keys leave no candidate beside a window of {window}")
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel must be odd and positive, not {pool_kernel}")
    if queries.shape[0] % heads:
        raise ValueError(f"Hq must be a multiple of H: {queries.shape[0]} query heads, {heads} KV heads")
    dtype = compute_dtype(keys)
    factor = 1.0 / math.sqrt(head_size) if scale is None else scale
    grouped = queries.to(dtype).unflatten(0, (heads, -1))  # [H, G, rows, D]
    logits = torch.einsum("hgtd,hnd->hgtn", grouped, keys[:, :candidates].to(dtype)) * factor
    attention = logits.amax(dim=1).softmax(dim=-1).mean(dim=1)  # [H, candidates]
    return torch.nn.functional.max_pool1d(attention, pool_kernel, stride=1, padding=pool_kernel // 2)


def similarity(keys: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """Cosine similarity of all pairs of keys with a zero diagonal (rkv_spec 1.3, steps 1 and 2).

    Args:
        keys: [H, N, D].
        eps: added to each key's Euclidean norm.

    Returns:
        [H, N, N], float64 for float64 keys and float32 otherwise.
    """
    keys = keys.to(compute_dtype(keys))
    units = keys / (keys.norm(dim=-1, keepdim=True) + eps)
    result = units @ units.transpose(-1, -2)
    result.diagonal(dim1=-2, dim2=-1).zero_()
    return result


def newest_match(similarities: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """For each row the newest key more similar than the threshold, or slot 0 (rkv_spec 1.3, steps 3 and 4).

    Args:
        similarities: [H, N, N] with a zero diagonal.
        threshold: similarity that a match has to exceed.

    Returns:
        int64 [H, N], the column of the one link that each row cuts.
    """
    columns = torch.arange(similarities.shape[-1], device=similarities.device)
    return torch.where(similarities > threshold, columns, 0).amax(dim=-1)


def redundancy(keys: torch.Tensor, *, threshold: float, eps: float = 1e-8) -> torch.Tensor:
    """How much each key resembles the others, its newest duplicate spared (rkv_spec 1.3; paper section 3.3).

    Args:
        keys: [H, N, D], all cached keys, window included, oldest first.
        threshold: cosine similarity above which two keys count as duplicates.
        eps: added to each key's Euclidean norm.

    Returns:
        [H, N], softmax over all N keys; float64 for float64 keys and float32 otherwise.
    """
    similarities = similarity(keys, eps=eps)
    cut = newest_match(similarities, threshold=threshold)
    similarities.scatter_(-1, cut.unsqueeze(-1), 0.0)
    return similarities.mean(dim=-2).softmax(dim=-1)


def rkv_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    window: int,
    lam: float,
    threshold: float,
    pool_kernel: int,
    scale: float | None = None,
) -> torch.Tensor:
    """``lam * importance - (1 - lam) * redundancy`` of each candidate (rkv_spec 1.4; paper section 3.4).

    Args:
        queries: [Hq, rows, D].
        keys: [H, N, D].
        window: number of newest keys that are no candidates.
        lam: weight of importance, 0 to 1.
        threshold: cosine similarity above which two keys count as duplicates.
        pool_kernel: odd width, in tokens, of the max-pooling of importance.
        scale: factor on the attention logits; ``1 / sqrt(D)`` when None.

    Returns:
        [H, N - window]; float64 for float64 keys and float32 otherwise.

    Raises:
        ValueError: as ``importance``.
    """
    important = importance(queries, keys, window=window, pool_kernel=pool_kernel, scale=scale)
    redundant = redundancy(keys, threshold=threshold)[:, : keys.shape[1] - window]
    return lam * important - (1.0 - lam) * redundant


def shared_scores(scores: torch.Tensor, scope: Literal["head", "layer", "global"]) -> torch.Tensor:
    """What every head selects by: its own scores, its layer's, or those of all layers (rkv_spec 1.8).

    Args:
        scores: [L, H, candidates]; where one head's score is NaN, so is what it is shared in.
        scope: ``layer`` takes the mean over the heads, ``global`` the sum of those means over the layers.

    Returns:
        [L, H, candidates] in the dtype of ``scores``.
    """
    if scope == "head":
        return scores
    shared = scores.mean(dim=1, keepdim=True)
    if scope == "global":
        shared = torch.stack([sum(shared.unbind())])  # layer after layer: rounding is part of what is defined
    return shared.expand_as(scores)


def protected(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Scores by which the first tokens, or pages, are selected before all others (rkv_spec 1.9).

    Args:
        scores: [..., candidates].
        count: of each row's first ones.

    Returns:
        [..., candidates], infinite for the first ``count``.
    """
    slots = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(slots < count, math.inf, scores)


def select(
    scores: torch.Tensor, count: int, order: Literal["temporal", "score"] = "temporal"
) -> torch.Tensor:
    """Indices of the highest scores; among equal scores the lower index wins (rkv_spec 1.4, 1.6).

    Args:
        scores: [H, candidates]; NaN counts as the lowest score.
        count: number of indices a head, 0 to ``candidates``.
        order: ``temporal`` gives them ascending, ``score`` the best first.

    Returns:
        int64 [H, count].

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 0 <= count <= scores.shape[-1]:
        raise ValueError(f"cannot select {count} of {scores.shape[-1]} candidates")
    ranked = torch.where(scores.isnan(), -math.inf, scores).sort(dim=-1, descending=True, stable=True)
    best = ranked.indices[..., :count]
    return best.sort(dim=-1).values if order == "temporal" else best


def kept_indices(
    scores: torch.Tensor,
    keep: int,
    length: int,
    order: Literal["temporal", "score"] = "temporal",
    protect: int = 0,
) -> torch.Tensor:
    """The survivors of a round: the best candidates in their order, then the window (rkv_spec 1.4, 1.6, 1.9).

    Args:
        scores: [H, candidates]; the ``length - candidates`` newest tokens are the window.
        keep: tokens kept, the window included.
        length: physical length N in tokens.
        order: of the candidates, as in ``select``.
        protect: first tokens that stay whatever their scores, at most ``keep`` less the window.

    Returns:
        int64 [H, keep].

    Raises:
        ValueError: ``keep`` is smaller than the window or larger than ``length``.
    """
    heads, candidates = scores.shape
    chosen = select(protected(scores, protect), keep - (length - candidates), order)
    tail = torch.arange(candidates, length, device=scores.device).expand(heads, -1)
    return torch.cat([chosen, tail], dim=-1)


def compact(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Gather each head's survivors.

    Args:
        tokens: [H, N, C], keys, values, or both side by side.
        kept: int64 [H, keep], in the order in which they are to lie.

    Returns:
        [H, keep, C] in the dtype of ``tokens``.
    """
    return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def page_scores(scores: torch.Tensor, page_size: int) -> torch.Tensor:
    """Mass of each page: a per-token score summed over the heads and over the page's slots.

    Args:
        scores: [H, candidates].
        page_size: tokens a page; the last page may be partly filled.

    Returns:
        [ceil(candidates / page_size)] in the dtype of ``scores``.
    """
    pages = -(-scores.shape[-1] // page_size)
    padded = torch.nn.functional.pad(scores, (0, pages * page_size - scores.shape[-1]))
    return padded.unflatten(-1, (pages, page_size)).sum(dim=(0, -1))
