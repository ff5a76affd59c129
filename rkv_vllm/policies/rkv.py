"""R-KV: important and not redundant (arXiv 2505.24133, section 3; rkv_spec section 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from rkv_vllm.kernels import tiled
from rkv_vllm.policies.base import ScoreInputs
from rkv_vllm.settings.config import POOL_KERNEL, SIMILARITY_THRESHOLD, WINDOW, RkvConfig


@dataclass(frozen=True)
class Rkv:
    """`mix_lambda` times importance, less `1 - mix_lambda` times redundancy.

    With `mix_lambda` 1 importance alone decides, which is how SnapKV scores (arXiv 2404.14469), with R-KV's
    grouping of query heads.
    """

    mix_lambda: float

    @classmethod
    def from_config(cls, config: RkvConfig, weight: float | None) -> Self:
        assert weight is not None, "the policy weighs importance against redundancy"
        return cls(weight)

    def scores(self, inputs: ScoreInputs) -> torch.Tensor:
        """Returns: float32 [H, N - WINDOW] (rkv_spec 1.4).

        Raises: AssertionError where the queries are missing.
        """
        assert inputs.queries is not None, "policy rkv needs the window's queries, got None"
        return tiled.rkv_scores(
            inputs.queries,
            inputs.keys[:, :],
            window=WINDOW,
            lam=self.mix_lambda,
            threshold=SIMILARITY_THRESHOLD,
            pool_kernel=POOL_KERNEL,
            scale=inputs.scale,
        )
