"""The description of a batch: what it accepts, refuses, and sends to the device."""

from __future__ import annotations

import pytest
import torch

from rkv_vllm.kernels.batch import CompactionBatch, QueryWindow


def build(**changes: object) -> CompactionBatch:
    arguments: dict[str, object] = {
        "lengths": [40, 20],
        "keeps": [20, 16],
        "source_pages": [[5, 6, 7, 99], [1, 2]],
        "target_pages": [[5, 6], [1]],
        "page_size": 16,
        "device": "cpu",
        "queries": [QueryWindow(3, 41, 8), QueryWindow(0, 20, 20)],
    }
    return CompactionBatch.build(**{**arguments, **changes})  # type: ignore[arg-type]


def test_batch_reaches_the_device_as_given() -> None:
    """Proves the tables equal to the lists, padded with zeros, pages behind the last token left out."""
    batch = build()
    assert batch.lengths_on_device.tolist() == batch.lengths == [40, 20]
    assert batch.keeps_on_device.tolist() == batch.keeps == [20, 16]
    assert batch.source_pages.tolist() == [[5, 6, 7], [1, 2, 0]]
    assert batch.target_pages.tolist() == [[5, 6], [1, 0]]
    assert batch.query_rows.tolist() == [3, 0]
    assert batch.query_ends.tolist() == [41, 20]
    assert batch.query_counts.tolist() == [8, 20]
    assert batch.protects_on_device.tolist() == batch.protects == [0, 0]
    assert build(protects=[4, 16]).protects_on_device.tolist() == [4, 16]
    assert batch.highest_page == 7 and batch.num_requests == 2
    tables = (batch.lengths_on_device, batch.query_rows, batch.source_pages, batch.target_pages)
    assert {table.dtype for table in tables} == {torch.int32}


@pytest.mark.parametrize(
    ("target", "staged"),
    [
        ([5, 6], []),  # the front of the own pages
        ([8, 9], []),  # other pages
        ([8, 6], []),  # a shared page replaced
        ([8, 5], []),  # an own page further back: all of its tokens have moved by then
        ([6, 5], [0]),  # an own page further to the front, whose tokens may not have moved
        ([5, 7], [0]),
    ],
)
def test_only_dangerous_targets_are_staged(target: list[int], staged: list[int]) -> None:
    """Proves which orders of target pages could overwrite a token before it has moved."""
    batch = build(target_pages=[target, [1]])
    assert batch.staged == staged
    assert batch.staged_on_device.tolist() == [len(staged), 0]


@pytest.mark.parametrize(("target", "staged"), [([5, 6], [0]), ([8, 5], [0]), ([8, 9], [])])
def test_in_the_order_of_scores_every_own_page_is_dangerous(target: list[int], staged: list[int]) -> None:
    """Proves that only a request that moves into other pages alone is moved without scratch memory."""
    batch = build(target_pages=[target, [3]], order="score")
    assert batch.staged == staged
    assert batch.staged_on_device.tolist() == [len(staged), 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [], "keeps": [], "source_pages": [], "target_pages": [], "queries": []}, "at least"),
        ({"queries": [QueryWindow(1, 9, 8)]}, "same number"),
        ({"queries": [QueryWindow(-1, 9, 8), QueryWindow(0, 9, 8)]}, "query rows"),
        ({"queries": [QueryWindow(1, 9, 8), QueryWindow(0, 9, 10)]}, "before position 0"),
        ({"queries": [QueryWindow(1, 9, 8), QueryWindow(0, 9, 0)]}, "before position 0"),
        ({"keeps": [41, 16]}, "cannot keep 41 of 40"),
        ({"keeps": [0, 16]}, "cannot keep 0"),
        ({"source_pages": [[5, 6], [1, 2]]}, "3 source"),
        ({"target_pages": [[5], [1]]}, "2 target"),
        ({"target_pages": [[5, -1], [1]]}, "negative"),
        ({"target_pages": [[5, 5], [1]]}, "given twice"),
        ({"target_pages": [[5, 1], [3]]}, "page 1 of request 1 is a target of request 0"),
    ],
)
def test_wrong_batches_are_refused(changes: dict[str, object], message: str) -> None:
    """Proves each mistake named before any kernel sees it."""
    with pytest.raises(ValueError, match=message):
        build(**changes)
