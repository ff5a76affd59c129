"""What both compactors make of given scores, for every policy: how they are shared, ordered, and followed.

The expected scores are computed by the policies themselves, as the CPU's compactor does, so that nothing is
proved of them here: they are compared with the reference in ``tests/unit/test_policies.py``, and the kernels'
in ``test_compaction_round.py``. Sharing, order and movement are the reference's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.paged_cache import DEVICE, PagedCache
from support.plain_cache import PlainCache, PlainQueries, Tables, all_layers

from rkv_vllm.decisions.messages import TokenCompaction
from rkv_vllm.decisions.query_rows import NO_QUERY_ROW
from rkv_vllm.execution.cpu.compactor import CpuTokenCompactor
from rkv_vllm.execution.gpu.compactor import GpuTokenCompactor
from rkv_vllm.kernels import naive
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import ScoreInputs, make_policies
from rkv_vllm.settings.config import Order, PolicyName, RkvConfig, Scope
from rkv_vllm.settings.policy_table import NUM_QUERIES, POLICY_NAMES

PAGE, LAYERS, HEADS, GROUP, SIZE = 16, 3, 2, 2, 32
SCALE = SIZE**-0.5
PAIRS = RotaryPairs(rotated=SIZE)
#: Length, tokens that stay and logical length of each policy's request; all have been compacted before.
LENGTH, KEEP, LOGICAL = 61, 40, 500
#: First tokens that stay whatever their scores, in half of the cases.
PROTECT = 19

VARIANTS = [(scope, order) for scope in ("head", "layer", "global") for order in ("temporal", "score")]


#: Another group's pages come first in messages.
ALL, OF_OTHERS = all_layers(LAYERS, place=1), (0, 1)


class Setup:
    """One request a policy, its survivors to go to the front of its own pages."""

    def __init__(self, scope: Scope, order: Order, protect: int = 0) -> None:
        self.protect = protect
        self.config = RkvConfig(mix_lambda=0.3, scope=scope, order=order)
        self.policies = make_policies(self.config)
        cache = PagedCache(
            [LENGTH] * len(POLICY_NAMES),
            layers=LAYERS,
            heads=HEADS,
            group=GROUP,
            head_size=SIZE,
            page_size=PAGE,
            shift=0.0,
            seed=7,
            device=torch.device("cpu"),
        )
        self.layers = torch.stack(cache.layers)
        self.queries = cache.queries
        self.compactions = [
            TokenCompaction(
                request_id=policy,
                length=LENGTH,
                keep=KEEP,
                evicted=LOGICAL - KEEP,
                policy=policy,
                query_row=cache.rows[index] if NUM_QUERIES[policy] else NO_QUERY_ROW,
                num_queries=NUM_QUERIES[policy],
                source_pages=(OF_OTHERS, tuple(cache.source[index])),
                target_pages=(OF_OTHERS, tuple(cache.source[index][: -(-KEEP // PAGE)])),
                protect=protect,
                num_previous_survivors=KEEP,
            )
            for index, policy in enumerate(POLICY_NAMES)
        ]

    def tokens(self, layers: torch.Tensor, compaction: TokenCompaction, length: int) -> torch.Tensor:
        """[L, H, length, 2 D] of a request."""
        pages = list(compaction.source_pages[ALL.place])
        return layers[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :length]

    def expected(self, compaction: TokenCompaction) -> torch.Tensor:
        """[L, H, KEEP, 2 D] after the round."""
        tokens = self.tokens(self.layers, compaction, LENGTH)
        scores = torch.stack(
            [self._scores(compaction.policy, tokens[layer], layer, compaction) for layer in range(LAYERS)]
        )
        shared = naive.shared_scores(scores.double(), self.config.scope)
        order, protect = self.config.order, self.protect
        kept = [naive.kept_indices(own, KEEP, LENGTH, order, protect) for own in shared]
        return torch.stack([naive.compact(tokens[layer], kept[layer]) for layer in range(LAYERS)])

    def _scores(
        self, policy: PolicyName, tokens: torch.Tensor, layer: int, compaction: TokenCompaction
    ) -> torch.Tensor:
        inputs = ScoreInputs(
            keys=tokens[..., :SIZE],
            queries=PlainQueries(self.queries).newest(
                layer, max(compaction.query_row, 0), LOGICAL, NUM_QUERIES[policy]
            ),
            scale=SCALE,
            layer=layer,
            logical_length=LOGICAL,
            num_previous_survivors=compaction.num_previous_survivors,
            protected=self.protect,
            rotary_pairs=PAIRS,
        )
        return self.policies[policy].scores(inputs)

    def check(self, compacted: torch.Tensor) -> None:
        for compaction in self.compactions:
            found = self.tokens(compacted, compaction, KEEP)
            assert torch.equal(found, self.expected(compaction)), compaction.policy


@pytest.mark.parametrize("protect", [0, PROTECT])
@pytest.mark.parametrize(("scope", "order"), VARIANTS)
def test_the_cpu_keeps_what_the_reference_keeps(scope: Scope, order: Order, protect: int) -> None:
    """Proves for every policy that the CPU's compactor shares scores and lays out survivors as defined."""
    setup = Setup(scope, order, protect)
    caches: Any = [PlainCache(layer.clone(), SCALE, PAGE) for layer in setup.layers]
    queries: Any = PlainQueries(setup.queries)
    tables = Tables()
    CpuTokenCompactor(caches, queries, setup.config, setup.policies, PAIRS, ALL).run(
        setup.compactions, tables
    )
    setup.check(torch.stack([cache.data for cache in caches]))
    assert tables.pages == {c.request_id: c.target_pages[ALL.place] for c in setup.compactions}


@pytest.mark.parametrize(
    ("scope", "order", "protect"),
    [(*variant, protect) for variant in VARIANTS for protect in (0, PROTECT)]
    if DEVICE.type == "cuda"
    else [("layer", "temporal", 0), ("global", "score", PROTECT)],
)
def test_the_gpu_keeps_what_the_reference_keeps(scope: Scope, order: Order, protect: int) -> None:
    """Proves the same of the kernels, for policies with scores of their own and those scored in torch."""
    setup = Setup(scope, order, protect)
    layers = [layer.to(DEVICE) for layer in setup.layers.clone()]
    compactor = GpuTokenCompactor(
        layers,
        setup.queries.to(DEVICE),
        lambda: torch.full((LAYERS, HEADS), SCALE, device=DEVICE),
        setup.config,
        setup.policies,
        group=ALL,
        pairs=PAIRS,
        longest=LENGTH,
        ranks_per_kv_head=1,
    )
    tables = Tables()
    chosen = [c for c in setup.compactions if DEVICE.type == "cpu" or c.policy != "random"]
    compactor.run(chosen, tables)  # random draws otherwise on a GPU than the CPU's reference
    setup.compactions = chosen
    setup.check(torch.stack(layers).cpu())
    assert tables.pages == {c.request_id: c.target_pages[ALL.place] for c in chosen}
