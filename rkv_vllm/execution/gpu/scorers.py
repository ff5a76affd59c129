"""The kernels that score a round, by its policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import torch

from rkv_vllm.decisions.messages import Compaction
from rkv_vllm.kernels.invariant_scorer import InvariantScorer
from rkv_vllm.kernels.rkv_scorer import RkvScorer
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.kernels.scorer import Scorer
from rkv_vllm.policies import invariant, weights
from rkv_vllm.settings.config import POOL_KERNEL, SIMILARITY_THRESHOLD, PolicyName, RkvConfig
from rkv_vllm.settings.policy_table import KERNELS, Kernel


def by_kernel(rounds: Sequence[Compaction]) -> dict[Kernel | None, list[int]]:
    """Indices of the rounds that each set of kernels scores; None: those that are scored in torch."""
    found: dict[Kernel | None, list[int]] = {}
    for index, round_ in enumerate(rounds):
        found.setdefault(KERNELS.get(round_.policy), []).append(index)
    return found


class KernelScorers:
    """Makes scorers from the server's settings and the model's shape.

    Attributes:
        factors: gives float32 [L, H], what makes attention logits of products of queries and stored keys.
    """

    def __init__(self, config: RkvConfig, pairs: RotaryPairs, factors: Callable[[], torch.Tensor]) -> None:
        """
        Args:
            config: the server's settings.
            pairs: how the model's rotary embedding pairs a head's dimensions.
            factors: as the attribute.
        """
        self._weights = weights(config)
        self._pairs = pairs
        self.factors = factors

    def make(self, kernel: Kernel, queries: torch.Tensor, policies: Sequence[PolicyName]) -> Scorer:
        """What scores rounds of these policies, all of the same kernels.

        Args:
            kernel: their kernels.
            queries: [layers, rows, RING_SIZE, Hq, D], the query ring.
            policies: of each round.
        """
        chosen = torch.tensor(
            [self._weights[policy] for policy in policies], pin_memory=queries.device.type == "cuda"
        )
        weight = chosen.to(queries.device, non_blocking=True)
        match kernel:
            case "rkv":
                return RkvScorer(
                    queries,
                    self.factors(),
                    weight,
                    threshold=SIMILARITY_THRESHOLD,
                    pool_kernel=POOL_KERNEL,
                )
            case "invariant":
                return InvariantScorer(
                    queries,
                    self.factors(),
                    weight,
                    pairs=self._pairs,
                    pool_kernel=invariant.POOL_KERNEL,
                )

    def one_of_each(self, queries: torch.Tensor) -> list[Scorer]:
        """A scorer of each set of kernels, for one round."""
        policies = {kernel: policy for policy, kernel in KERNELS.items()}
        return [self.make(kernel, queries, [policies[kernel]]) for kernel in get_args(Kernel)]
