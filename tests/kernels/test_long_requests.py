"""Requests of any length that a server admits: memory is taken at start, and in a step it is bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.paged_cache import DEVICE, PagedCache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rkv_vllm.execution.gpu.paged_keys import PagedKeys
from rkv_vllm.kernels import naive
from rkv_vllm.kernels.batch import CompactionBatch
from rkv_vllm.kernels.cache_layout import PagedKV
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.move import STAGED_COLUMNS
from rkv_vllm.kernels.rkv_scorer import RkvScorer
from rkv_vllm.kernels.scorer import GivenScores
from rkv_vllm.kernels.scratch import ScratchMemory
from rkv_vllm.policies import ScoreInputs, make_policies
from rkv_vllm.settings.config import WINDOW, PolicyName, RkvConfig

PAGE = 16


def wide_cache(heads: int, tokens: int) -> PagedKV:
    """A cache of one layer whose pages all lie at the same place."""
    page = torch.zeros(1, heads, PAGE, 256, dtype=torch.bfloat16)
    return PagedKV([page.expand(tokens // PAGE + 2, -1, -1, -1)])


@pytest.mark.parametrize("shares_all_layers", [False, True])
@pytest.mark.parametrize("tokens", [WINDOW + 1, 76_161, 400_000, 1_048_592, 4_000_000])
@pytest.mark.parametrize("heads", [1, 8, 40])
def test_memory_is_taken_for_the_longest_request(heads: int, tokens: int, shares_all_layers: bool) -> None:
    """Proves that what is allocated at start holds a layer of the longest request, and hardly more."""
    kv = wide_cache(heads, tokens)
    batch = CompactionBatch.build(
        lengths=[tokens],
        keeps=[WINDOW + 1],
        source_pages=[range(-(-tokens // PAGE))],
        target_pages=[[0]],
        page_size=PAGE,
        device="cpu",
    )
    arguments: dict[str, Any] = {"window": WINDOW, "shares_all_layers": shares_all_layers, "longest": tokens}
    memory = ScratchMemory(kv, num_bytes=0, **arguments)
    memory.check(tokens)
    ((work,),) = memory.slices(batch)
    assert work.layers == 1 and work.directions.numel() == heads * 128
    assert work.staging.numel() >= tokens * STAGED_COLUMNS
    if memory.num_bytes > 64 << 20:
        assert ScratchMemory(kv, num_bytes=64 << 20, **arguments).num_bytes == memory.num_bytes
    with pytest.raises(ValueError, match=f"does not hold one layer of {tokens} tokens"):
        smaller = ScratchMemory(kv, num_bytes=memory.num_bytes - 64, **arguments | {"longest": 0})
        smaller.check(tokens)


def test_the_least_memory_gives_the_same_round() -> None:
    """Proves that a round in memory for just its longest request moves what one in ample memory moves."""
    results = []
    for settings in ({}, {"scratch_bytes": 0, "longest": 130}):
        cache = PagedCache([30, 130, 25], layers=3, heads=2, group=2, seed=4)
        lam = torch.tensor([0.1, 1.0, 0.0], device=DEVICE)
        rounds = CompactionRound(cache.kv, window=WINDOW, **settings)
        rounds.run(RkvScorer(cache.queries, cache.factors, lam), cache.batch([20, 100, 24]))
        results.append(torch.stack(cache.layers))
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("candidates", [2**20 - 1, 2**20, 2**20 + 16])
def test_selection_beyond_a_million_candidates(candidates: int) -> None:
    """Proves that the best are kept of more candidates than a 20-bit count can hold."""
    length, keep = candidates + WINDOW, 64
    row = torch.zeros(length // PAGE + 8, 1, PAGE, 32, device=DEVICE)
    row[..., 0] = torch.arange(row.shape[0] * PAGE, device=DEVICE).view(-1, 1, PAGE)  # its slot
    free = row.shape[0] - keep // PAGE
    batch = CompactionBatch.build(
        lengths=[length],
        keeps=[keep],
        source_pages=[range(-(-length // PAGE))],
        target_pages=[range(free, free + keep // PAGE)],
        page_size=PAGE,
        device=DEVICE,
    )
    scores = torch.randn(1, 1, candidates, generator=torch.Generator().manual_seed(candidates)).to(DEVICE)
    CompactionRound(PagedKV([row]), longest=length).run(GivenScores(lambda layer: scores), batch)
    kept = row[free : free + keep // PAGE, 0, :, 0].flatten().long().cpu()
    assert torch.equal(kept, naive.kept_indices(scores[0].cpu(), keep, length)[0])


class LargestTensor(TorchDispatchMode):
    """Remembers how many bytes the largest result of an operation that takes memory has."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() not in given:
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("policy", ["keydiff", "recency", "random"])
def test_policies_without_kernels_read_a_few_pages_at_a_time(policy: PolicyName) -> None:
    """Proves that a long request takes no more memory than its scores, or a block of keys in float32."""
    heads, size, tokens = 8, 128, 16_384
    keys = torch.zeros(1, heads, PAGE, 2 * size).expand(tokens // PAGE, -1, -1, -1)[..., :size]
    pages = torch.arange(tokens // PAGE, dtype=torch.int32)
    inputs = ScoreInputs(PagedKeys(keys, pages, tokens), None, 1.0, 0, tokens)
    with LargestTensor() as largest:
        make_policies(RkvConfig())[policy].scores(inputs)
    assert 0 < largest.num_bytes <= max(4 * heads * tokens, 4 * 2**21 + 4 * heads * size * PAGE)
    assert largest.num_bytes < 4 * heads * tokens * size // 4


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (16, 32), (3, 70), (60, 100), (0, 100), (99, 100)])
def test_parts_of_paged_keys_are_those_of_the_whole(start: int, stop: int) -> None:
    """Proves that any part of the keys is read from the right slots of the right pages."""
    keys = torch.randn(9, 2, PAGE, 8)
    pages = torch.tensor([4, 1, 7, 0, 8, 2, 6], dtype=torch.int32)
    whole = keys[pages].transpose(0, 1).flatten(1, 2)[:, :100]
    paged = PagedKeys(keys, pages, 100)
    assert paged.shape == whole.shape
    assert torch.equal(paged[:, start:stop], whole[:, start:stop])
