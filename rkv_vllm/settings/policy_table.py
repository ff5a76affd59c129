"""The table of policies: what each is called, where its class is, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: The names below, for annotations; a test holds them equal.
PolicyName = Literal["rkv", "snapkv", "keydiff", "recency", "random"]


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """One policy.

    What scores are made of is `ScoreInputs` in `policies/base.py`. A policy that needs more than keys and
    queries (values, positions, or another number of queries) brings a field here that says so.

    Attributes:
        name: what users write.
        class_path: module and class that score, as `module:Class`.
        needs_queries: whether it looks at the queries of the last `WINDOW` tokens.
        kernel_weight: weight of importance against redundancy with which the Triton kernels score it, or the
            field of `RkvConfig` that has it; None: they do not, and its class scores on GPUs too.
        keeps: the tokens that it keeps, in some words.
        paper: arXiv number of where it comes from.
    """

    name: PolicyName
    class_path: str
    needs_queries: bool
    kernel_weight: float | Literal["mix_lambda"] | None
    keeps: str
    paper: str | None


POLICIES: tuple[PolicySpec, ...] = (
    PolicySpec(
        name="rkv",
        class_path="rkv_vllm.policies.rkv:Rkv",
        needs_queries=True,
        kernel_weight="mix_lambda",
        keeps="important and not redundant ones",
        paper="2505.24133",
    ),
    PolicySpec(
        name="snapkv",
        class_path="rkv_vllm.policies.rkv:Rkv",
        needs_queries=True,
        kernel_weight=1.0,
        keeps="those that the newest tokens attend to",
        paper="2404.14469",
    ),
    PolicySpec(
        name="keydiff",
        class_path="rkv_vllm.policies.keydiff:KeyDiff",
        needs_queries=False,
        kernel_weight=None,
        keeps="those whose keys differ from the mean key",
        paper="2504.15364",
    ),
    PolicySpec(
        name="recency",
        class_path="rkv_vllm.policies.recency:Recency",
        needs_queries=False,
        kernel_weight=None,
        keeps="the first four and the newest",
        paper="2309.17453",
    ),
    PolicySpec(
        name="random",
        class_path="rkv_vllm.policies.random:Random",
        needs_queries=False,
        kernel_weight=None,
        keeps="any, to compare with",
        paper=None,
    ),
)

POLICY_NAMES: tuple[PolicyName, ...] = tuple(policy.name for policy in POLICIES)
#: Policies that look at the queries of the last tokens.
QUERY_POLICIES: frozenset[PolicyName] = frozenset(p.name for p in POLICIES if p.needs_queries)


def markdown_table() -> str:
    """The table for the README."""
    rows = [
        f"| `{policy.name}` | {policy.keeps} | "
        + (f"[{policy.paper}](https://arxiv.org/abs/{policy.paper}) |" if policy.paper else "|")
        for policy in POLICIES
    ]
    return "\n".join(["| policy | keeps tokens: | paper |", "|---|---|---|", *rows])
