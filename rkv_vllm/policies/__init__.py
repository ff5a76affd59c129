"""Selection policies: what scores tokens when a cache is compacted."""

from __future__ import annotations

from rkv_vllm.policies.base import Policy, ScoreInputs
from rkv_vllm.policies.keydiff import KeyDiff
from rkv_vllm.policies.random import Random
from rkv_vllm.policies.recency import Recency
from rkv_vllm.policies.rkv import Rkv
from rkv_vllm.settings.config import PolicyName, RkvConfig

__all__ = ["Policy", "ScoreInputs", "make_policies"]


def make_policies(config: RkvConfig) -> dict[PolicyName, Policy]:
    """Every policy that a request may choose, by name."""
    return {
        "rkv": Rkv(config.mix_lambda),
        "snapkv": Rkv(mix_lambda=1.0),
        "keydiff": KeyDiff(),
        "recency": Recency(config.order),
        "random": Random(),
    }
