"""Physical lengths and the query ring's write, against plain Python."""

from __future__ import annotations

import pytest
import torch

from rkv_vllm.kernels.query_capture import capture
from rkv_vllm.kernels.step_inputs import prepare_physical

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 8
MAX_REQUESTS, MAX_TOKENS = 7, 3000


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 2500, 3, 1], [5]])
def test_physical_lengths_and_places_are_those_of_each_request(counts: list[int]) -> None:
    """Each token gets slot and ring index by its own request's counts; what lies behind is blanked."""
    slots = [4, 0, 6, 2][: len(counts)]
    evicted = [0, 1000, 50, 0, 300, 9, 77]
    rows = [-1, 3, 2, -1, 5, 1, -1]
    logical = [count + evicted[slot] + 13 * slot for count, slot in zip(counts, slots, strict=True)]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    seq_lens = torch.full((MAX_REQUESTS,), -5, dtype=torch.int32, device=DEVICE)
    positions = torch.full((MAX_TOKENS,), -5, dtype=torch.int64, device=DEVICE)
    ring_indices = torch.full((MAX_TOKENS,), 99, dtype=torch.int32, device=DEVICE)

    prepare_physical(
        torch.tensor(slots, device=DEVICE),
        _int32(starts),
        _int32(logical),
        _int32(evicted),
        _int32(rows),
        physical_seq_lens=seq_lens,
        physical_positions=positions,
        ring_indices=ring_indices,
        ring_size=WINDOW,
    )

    padding = [0] * (MAX_REQUESTS - len(counts))
    assert seq_lens.tolist() == [n - evicted[s] for n, s in zip(logical, slots, strict=True)] + padding
    expected_positions, expected_places = [], []
    for count, slot, length in zip(counts, slots, logical, strict=True):
        for position in range(length - count, length):
            expected_positions.append(position - evicted[slot])
            captured = rows[slot] >= 0 and position >= length - WINDOW
            expected_places.append(rows[slot] * WINDOW + position % WINDOW if captured else -1)
    assert positions[: sum(counts)].tolist() == expected_positions
    assert ring_indices.tolist() == expected_places + [-1] * (MAX_TOKENS - sum(counts))


@pytest.mark.parametrize(("heads", "size"), [(3, 80), (4, 64), (1, 16)])
def test_only_the_chosen_queries_are_written(heads: int, size: int) -> None:
    """A token with a index lands there, unchanged; tokens without one are not written anywhere."""
    tokens = torch.randn(11, heads, 2 * size, device=DEVICE)[..., :size].contiguous()
    ring = torch.full((4, WINDOW, heads, size), 7.0, device=DEVICE)
    ring_indices = [-1] * 11
    ring_indices[2], ring_indices[5], ring_indices[10] = 31, 0, 12

    capture(tokens, _int32([*ring_indices, 3, 3]), ring)  # ring_indices behind the batch are not looked at

    expected = torch.full((4 * WINDOW, heads, size), 7.0, device=DEVICE)
    for token, index in enumerate(ring_indices):
        if index >= 0:
            expected[index] = tokens[token]
    assert torch.equal(ring.flatten(0, 1), expected)
