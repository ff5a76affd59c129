"""What a recorder is told of rounds, on either device, against what the cache holds afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.paged_cache import DEVICE, PagedCache
from support.plain_cache import PlainCache, PlainQueries, Tables, all_layers

from rkv_vllm.decisions.messages import PageCompaction, TokenCompaction
from rkv_vllm.decisions.query_rows import NO_QUERY_ROW
from rkv_vllm.execution.cpu.compactor import CpuTokenCompactor
from rkv_vllm.execution.gpu.compactor import GpuPageCompactor, GpuTokenCompactor
from rkv_vllm.inspection import cpu_hooks, gpu_hooks
from rkv_vllm.inspection.recorder import Record, Recorder
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import make_policies
from rkv_vllm.settings.config import Order, PolicyName, RkvConfig, Scope
from rkv_vllm.settings.policy_table import NUM_QUERIES

PAGE, LAYERS, HEADS, GROUP, SIZE = 16, 3, 2, 2, 32
SCALE = SIZE**-0.5
PAIRS = RotaryPairs(rotated=SIZE)
#: Tokens of the first round, that stay in both, and that come between them.
FIRST, KEEP, NEW = 61, 40, 16
CASES: list[tuple[PolicyName, Scope, Order]] = [
    ("rkv", "head", "temporal"),
    ("rkv", "global", "score"),
    ("invariant", "layer", "temporal"),
    ("snapkv", "head", "score"),
    ("keydiff", "head", "temporal"),
]


def on_gpu(
    kind: type[GpuTokenCompactor | GpuPageCompactor], cache: PagedCache, config: RkvConfig, longest: int
) -> Any:
    """The GPU's compactor of a cache."""
    return kind(
        cache.layers,
        cache.queries,
        lambda: cache.factors,
        config,
        make_policies(config),
        group=all_layers(len(cache.layers)),
        pairs=PAIRS,
        longest=longest,
        ranks_per_kv_head=1,
    )


class TwoRounds:
    """A request in random pages, compacted twice, with NEW tokens in between.

    Attributes:
        keys: [L, H, FIRST + NEW, D], of each position in the text.
        held: after each round, [L, H, KEEP, D], the keys in the cache.
        record: what the recorder was told.
    """

    def __init__(
        self,
        device: str,
        policy: PolicyName,
        scope: Scope,
        order: Order,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._policy = policy
        self._cache = PagedCache(
            [FIRST],
            layers=LAYERS,
            heads=HEADS,
            group=GROUP,
            head_size=SIZE,
            page_size=PAGE,
            dtype=dtype,
            seed=11,
            device=DEVICE if device == "gpu" else torch.device("cpu"),
        )
        config = RkvConfig(mix_lambda=0.3, scope=scope, order=order)
        compactor: Any
        if device == "gpu":
            compactor = on_gpu(GpuTokenCompactor, self._cache, config, FIRST)
        else:
            caches: Any = [PlainCache(layer, SCALE, PAGE) for layer in self._cache.layers]
            queries: Any = PlainQueries(self._cache.queries)
            compactor = CpuTokenCompactor(
                caches, queries, config, make_policies(config), PAIRS, all_layers(LAYERS)
            )
        recorder = Recorder()
        (gpu_hooks if device == "gpu" else cpu_hooks).record_rounds(compactor, recorder)
        first = self._tokens(FIRST)
        self.held: list[torch.Tensor] = []
        with recorder.recording(LAYERS, HEADS, FIRST + NEW, with_scores=True):
            compactor.run([self._round(FIRST, FIRST - KEEP)], Tables())
            self.held.append(self._tokens(KEEP))
            added = self._write_new_tokens()
            compactor.run([self._round(KEEP + NEW, FIRST + NEW - KEEP)], Tables())
            self.held.append(self._tokens(KEEP))
        compactor.run([self._round(KEEP + NEW, FIRST + NEW)], Tables())  # is not recorded
        self.keys = torch.cat((first, added), dim=2)
        self.record: Record = recorder.record(FIRST + NEW)

    def _round(self, length: int, evicted: int) -> TokenCompaction:
        num_queries = NUM_QUERIES[self._policy]
        return TokenCompaction(
            request_id="a",
            length=length,
            keep=KEEP,
            evicted=evicted,
            policy=self._policy,
            query_row=self._cache.rows[0] if num_queries else NO_QUERY_ROW,
            num_queries=num_queries,
            source_pages=(tuple(self._cache.source[0][: -(-length // PAGE)]),),
            target_pages=(tuple(self._cache.source[0][: -(-KEEP // PAGE)]),),
        )

    def _tokens(self, length: int) -> torch.Tensor:
        """[L, H, length, D]: the keys in the first slots."""
        pages = torch.stack([layer[self._cache.source[0]] for layer in self._cache.layers])
        return pages.transpose(1, 2).flatten(2, 3)[:, :, :length, :SIZE].cpu().float()

    def _write_new_tokens(self) -> torch.Tensor:
        """Fills the slots behind the survivors; [L, H, NEW, D]."""
        new = torch.randn(LAYERS, HEADS, NEW, 2 * SIZE, generator=torch.Generator().manual_seed(5))
        new = new.to(self._cache.layers[0].dtype)
        for layer, tokens in zip(self._cache.layers, new, strict=True):
            for index in range(NEW):
                page, slot = divmod(KEEP + index, PAGE)
                layer[self._cache.source[0][page], :, slot] = tokens[:, index].to(layer.device)
        return new[..., :SIZE].float()


@pytest.mark.parametrize(("policy", "scope", "order"), CASES)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_is_recorded_is_what_the_cache_holds(
    device: str, policy: PolicyName, scope: Scope, order: Order
) -> None:
    """After each of two rounds the keys in the cache are those of the positions that did not leave, in every
    layer and head, wherever they lie."""
    check_held(TwoRounds(device, policy, scope, order))


def test_a_gpus_cache_in_fp8_is_recorded_and_explained() -> None:
    """Its keys are read as the numbers that they are, and its queries multiplied by all scales."""
    rounds = TwoRounds("gpu", "rkv", "head", "temporal", torch.float8_e4m3fn)
    check_held(rounds)
    assert rounds.record.importance is not None and len(np.unique(rounds.record.importance)) > 20


def check_held(rounds: TwoRounds) -> None:
    assert rounds.record.rounds == (FIRST, FIRST + NEW)
    for number, (held, length) in enumerate(zip(rounds.held, rounds.record.rounds, strict=True), start=1):
        left = rounds.record.left[..., :length]
        expected = (left == 0) | (left > number)
        same = (rounds.keys[:, :, :length, None] == held[:, :, None]).all(dim=-1)  # [L, H, length, KEEP]
        assert torch.equal(same.any(dim=3), torch.from_numpy(expected))
        assert expected.sum(axis=2).min() == expected.sum(axis=2).max() == KEEP


@pytest.mark.parametrize(("policy", "scope", "order"), CASES)
def test_both_devices_explain_alike(policy: PolicyName, scope: Scope, order: Order) -> None:
    """A GPU's rounds, scored by kernels, have the same parts as a CPU's, whose scores these parts make."""
    cpu, gpu = (TwoRounds(device, policy, scope, order).record for device in ("cpu", "gpu"))
    assert np.array_equal(cpu.left, gpu.left)
    looked_at = {"rkv": 3, "invariant": 2, "snapkv": 1, "keydiff": 0}[policy]
    parts = [(cpu.importance, gpu.importance), (cpu.redundancy, gpu.redundancy), (cpu.match, gpu.match)]
    assert sum(part is not None for part, _ in parts) == looked_at
    for ours, theirs in parts[:looked_at]:
        assert ours is not None and theirs is not None
        assert np.abs(ours.astype(int) - theirs).max() <= int(DEVICE.type == "cuda"), "a GPU rounds otherwise"


def test_pages_that_leave_a_gpus_block_table_are_recorded() -> None:
    """By page every layer and head loses the tokens of the pages that are gone from the row, no others."""
    length, dropped, config = 5 * PAGE + 7, 3, RkvConfig(granularity="page")
    cache = PagedCache(
        [length], layers=LAYERS, heads=HEADS, group=GROUP, head_size=SIZE, page_size=PAGE, seed=3
    )
    compactor = on_gpu(GpuPageCompactor, cache, config, length)
    row = torch.tensor(cache.source[0], dtype=torch.int32, device=DEVICE)
    tables: Any = Row(row)
    recorder = Recorder()
    gpu_hooks.record_rounds(compactor, recorder)
    eviction = PageCompaction(
        request_id="a",
        length=length,
        keep=length - dropped * PAGE,
        evicted=dropped * PAGE,
        policy="rkv",
        query_row=cache.rows[0],
        num_queries=NUM_QUERIES["rkv"],
        eviction_id=0,
    )
    with recorder.recording(LAYERS, HEADS, length, with_scores=False):
        compactor.run([eviction], tables)
    record = recorder.record(length)
    stay = set(row[: 6 - dropped].tolist())
    expected = [int(cache.source[0][slot // PAGE] not in stay) for slot in range(length)]
    assert sum(expected) == dropped * PAGE
    assert np.array_equal(record.left, np.broadcast_to(expected, record.left.shape))
    assert record.importance is None, "nobody asked for it"


class Row:
    """A block table of one row on the device."""

    def __init__(self, row: torch.Tensor) -> None:
        self._row = row

    def page_row(self, request_id: str) -> torch.Tensor:
        return self._row

    def set_num_pages(self, request_id: str, pages: int) -> None:
        pass
