"""Selection policies: what scores tokens when a cache is compacted."""

from __future__ import annotations

from importlib import import_module

from rkv_vllm.policies.base import Policy, ScoreInputs
from rkv_vllm.settings.config import PolicyName, RkvConfig
from rkv_vllm.settings.policy_table import POLICIES, PolicySpec

__all__ = ["Policy", "ScoreInputs", "make_policies", "weights"]


def make_policies(config: RkvConfig) -> dict[PolicyName, Policy]:
    """Every policy that a request may choose, by name, in the order of the table."""
    return {spec.name: _make(spec, config) for spec in POLICIES}


def weights(config: RkvConfig) -> dict[PolicyName, float]:
    """Weight of importance of each policy that weighs it against redundancy; the others are not in it."""
    found = {spec.name: _weight(spec, config) for spec in POLICIES}
    return {name: weight for name, weight in found.items() if weight is not None}


def _make(spec: PolicySpec, config: RkvConfig) -> Policy:
    module, _, name = spec.class_path.partition(":")
    policy_class: type[Policy] = getattr(import_module(module), name)
    return policy_class.from_config(config, _weight(spec, config))


def _weight(spec: PolicySpec, config: RkvConfig) -> float | None:
    return config.mix_lambda if spec.weight == "mix_lambda" else spec.weight
