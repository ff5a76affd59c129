"""R-KV's scores in vectorised torch: the CPU engine's path, and the plain-torch baseline on a GPU.

Same functions and results as ``naive``, in float32 whatever the input's dtype, with any leading batch
dimensions (several layers, say), and without a temporary above ``TEMPORARY_BYTES``: the N x N similarity
matrix never exists as a whole.

Redundancy uses that all column sums follow from the sum ``g`` of the normalised keys ``u`` (``sum_i s_ij =
u_j . g - |u_j|^2``, rkv_spec 3.1 B), so that only the newest match of each row needs the similarities. On a
CPU the columns are visited from the newest on, and a row leaves the search as soon as it has found its
match.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch

TEMPORARY_BYTES = 64 * 2**20
"""Upper bound on every temporary tensor, in bytes; an operation holds at most a few of them."""

_TILE_ELEMENTS = TEMPORARY_BYTES // 4 // 4  # float32 elements of one tile: a quarter of the bound
_COLUMNS = 256  # columns of one similarity tile


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _units(keys: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., D] in any float dtype -> float32 vectors of length one (zero keys stay zero)."""
    keys = keys.to(torch.float32, copy=True)
    return keys.div_(torch.linalg.vector_norm(keys, dim=-1, keepdim=True).add_(eps))


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
        queries: [..., Hq, rows, D], the window's queries after rotary embedding; their order does not matter.
        keys: [..., H, N, D], cached keys, oldest first; query head ``h * G + g`` reads key head ``h``.
        window: number of newest keys that are no candidates.
        pool_kernel: odd width, in tokens, of the max-pooling along the keys.
        scale: factor on the logits; ``1 / sqrt(D)`` when None.

    Returns:
        float32 [..., H, N - window].

    Raises:
        ValueError: no candidate is left, the pooling kernel is even, or Hq is no multiple of H.
    """
    heads, length, head_size = keys.shape[-3:]
    candidates = length - window
    if candidates < 1:
        raise ValueError(f"{length} keys leave no candidate beside a window of {window}")
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel must be odd and positive, not {pool_kernel}")
    if queries.shape[-3] % heads:
        raise ValueError(f"Hq must be a multiple of H: {queries.shape[-3]} query heads, {heads} KV heads")
    group, rows = queries.shape[-3] // heads, queries.shape[-2]
    factor = 1.0 / math.sqrt(head_size) if scale is None else scale
    flat_keys = keys[..., :candidates, :].flatten(0, -3)  # [B, candidates, D]
    flat_queries = queries.reshape(-1, group * rows, head_size).float() * factor  # [B, G * rows, D]

    result = torch.empty(flat_keys.shape[:2], dtype=torch.float32, device=keys.device)
    columns = min(candidates, max(1, _TILE_ELEMENTS // max(head_size, group * rows)))
    together = max(1, _TILE_ELEMENTS // (columns * max(head_size, group * rows)))
    for first, last in _spans(flat_keys.shape[0], together):
        logits = torch.empty((last - first, rows, candidates), dtype=torch.float32, device=keys.device)
        for start, end in _spans(candidates, columns):
            tile = flat_queries[first:last] @ flat_keys[first:last, start:end].float().transpose(-1, -2)
            torch.amax(tile.unflatten(1, (group, rows)), dim=1, out=logits[:, :, start:end])
        logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
        logits.div_(logits.sum(dim=-1, keepdim=True))
        attention = logits.mean(dim=1)
        result[first:last] = torch.nn.functional.max_pool1d(
            attention, pool_kernel, stride=1, padding=pool_kernel // 2
        )
    return result.unflatten(0, keys.shape[:-2])


def _search_dense(
    rows: torch.Tensor, keys: torch.Tensor, first_row: int, threshold: float, eps: float
) -> torch.Tensor:
    """Newest match of each row, without leaving the device.

    Args:
        rows: float32 [B, rows, D], normalised keys ``first_row``, ``first_row + 1``, ...
        keys: [B, N, D] in any float dtype.
        first_row: index of the first row.
        threshold: similarity that a match has to exceed.
        eps: added to each key's norm.

    Returns:
        int64 [B, rows]; 0 where no key matches.
    """
    found = torch.zeros(rows.shape[:2], dtype=torch.float32, device=keys.device)
    for start, end in _spans(keys.shape[1], _COLUMNS):
        similarity = rows @ _units(keys[:, start:end], eps).transpose(-1, -2)
        similarity.diagonal(offset=first_row - start, dim1=-2, dim2=-1).zero_()
        columns = torch.arange(start, end, dtype=torch.float32, device=keys.device)
        newest = similarity.gt_(threshold).mul_(columns).amax(dim=-1)
        torch.maximum(found, newest, out=found)
    return found.long()


def _search_newest_first(
    rows: torch.Tensor, keys: torch.Tensor, first_row: int, threshold: float, eps: float
) -> torch.Tensor:
    """As ``_search_dense``, but a row with its match takes no further part (asks the device, so CPU only)."""
    found = torch.zeros(rows.shape[:2], dtype=torch.int64)
    for head, units in enumerate(rows):
        waiting = torch.arange(first_row, first_row + units.shape[0])
        end = keys.shape[1]
        while end and waiting.numel():
            start = (end - 1) // _COLUMNS * _COLUMNS
            similarity = units @ _units(keys[head, start:end], eps).T
            own = ((waiting >= start) & (waiting < end)).nonzero().squeeze(-1)
            similarity[own, waiting[own] - start] = 0.0
            columns = torch.arange(start + 1, end + 1, dtype=torch.float32)
            newest = similarity.gt_(threshold).mul_(columns).amax(dim=-1).long()  # 1 + column, or 0
            found[head, waiting - first_row] = (newest - 1).clamp_(min=0)
            open_rows = (newest == 0).nonzero().squeeze(-1)
            waiting, units, end = waiting[open_rows], units[open_rows], start
    return found


def redundancy(keys: torch.Tensor, *, threshold: float, eps: float = 1e-8) -> torch.Tensor:
    """How much each key resembles the others, its newest duplicate spared (rkv_spec 1.3; paper section 3.3).

    Args:
        keys: [..., H, N, D], all cached keys, window included, oldest first.
        threshold: cosine similarity above which two keys count as duplicates.
        eps: added to each key's Euclidean norm.

    Returns:
        float32 [..., H, N], softmax over all N keys.
    """
    flat = keys.flatten(0, -3)  # [B, N, D]
    length, head_size = flat.shape[1:]
    search = _search_dense if keys.is_cuda else _search_newest_first
    step = min(length, max(1, _TILE_ELEMENTS // max(_COLUMNS, head_size)))
    together = max(1, _TILE_ELEMENTS // (step * max(_COLUMNS, head_size)))
    means = torch.empty(flat.shape[:2], dtype=torch.float32, device=keys.device)
    for first, last in _spans(flat.shape[0], together):
        chunk, sums = flat[first:last], means[first:last]
        total = torch.zeros((last - first, head_size, 1), dtype=torch.float32, device=keys.device)
        for start, end in _spans(length, step):
            total += _units(chunk[:, start:end], eps).sum(dim=1).unsqueeze(-1)
        cut = torch.zeros_like(sums)
        for start, end in _spans(length, step):
            units = _units(chunk[:, start:end], eps)
            sums[:, start:end] = (units @ total).squeeze(-1) - units.square().sum(dim=-1)
            match = search(units, chunk, start, threshold, eps)
            partner = chunk.gather(1, match.unsqueeze(-1).expand(-1, -1, head_size))
            link = (_units(partner, eps) * units).sum(dim=-1)
            link.masked_fill_(match == torch.arange(start, end, device=keys.device), 0.0)
            cut.scatter_add_(1, match, link)
        sums.sub_(cut).div_(length)
    return means.softmax(dim=-1).unflatten(0, keys.shape[:-2])


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
        queries: [..., Hq, rows, D].
        keys: [..., H, N, D].
        window: number of newest keys that are no candidates.
        lam: weight of importance, 0 to 1; redundancy is not computed at 1.
        threshold: cosine similarity above which two keys count as duplicates.
        pool_kernel: odd width, in tokens, of the max-pooling of importance.
        scale: factor on the attention logits; ``1 / sqrt(D)`` when None.

    Returns:
        float32 [..., H, N - window].

    Raises:
        ValueError: as ``importance``.
    """
    scores = importance(queries, keys, window=window, pool_kernel=pool_kernel, scale=scale)
    if lam == 1.0:
        return scores
    redundant = redundancy(keys, threshold=threshold)[..., : keys.shape[-2] - window]
    return scores.mul_(lam).sub_(redundant, alpha=1.0 - lam)


def select(
    scores: torch.Tensor, count: int, order: Literal["temporal", "score"] = "temporal"
) -> torch.Tensor:
    """Indices of the highest scores; among equal scores the lower index wins (rkv_spec 1.4, 1.6).

    Args:
        scores: [..., candidates]; NaN counts as the lowest score.
        count: number of indices a row, 0 to ``candidates``.
        order: ``temporal`` gives them ascending, ``score`` the best first.

    Returns:
        int64 [..., count].

    Raises:
        ValueError: ``count`` is out of range.
    """
    candidates = scores.shape[-1]
    if not 0 <= count <= candidates:
        raise ValueError(f"cannot select {count} of {candidates} candidates")
    if count == 0:
        return torch.empty((*scores.shape[:-1], 0), dtype=torch.int64, device=scores.device)
    flat = scores.reshape(-1, candidates)
    flat = torch.where(flat.isnan(), -math.inf, flat)
    cut = flat.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, level = flat > cut, flat == cut
    room = count - above.sum(dim=-1, keepdim=True)
    chosen = above | (level & (level.cumsum(dim=-1) <= room))
    slots = chosen.nonzero()[:, 1].view(-1, count)
    if order == "score":
        slots = slots.gather(1, flat.gather(1, slots).argsort(dim=-1, descending=True, stable=True))
    return slots.view(*scores.shape[:-1], count)
