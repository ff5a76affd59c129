"""The table of policies: what each is called, where its class is, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: The names below, for annotations; a test holds them equal.
PolicyName = Literal["rkv", "invariant", "snapkv", "keydiff", "recency", "random"]
#: Names of sets of Triton kernels that score.
Kernel = Literal["rkv", "invariant"]


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """One policy.

    What scores are made of is `ScoreInputs` in `policies/base.py`. A policy that needs more than keys and
    queries (values, say, or positions) brings a field here that says so.

    Attributes:
        name: what users write.
        class_path: module and class that score, as `module:Class`.
        num_queries: tokens, the newest ones, whose queries it looks at; 0: none.
        kernel: the Triton kernels that score it on GPUs; None: its class does there too.
        weight: of importance against redundancy, 0 to 1, or the field of `RkvConfig` that has it; None: the
            policy does not weigh them.
        keeps: the tokens that it keeps, in some words.
        paper: arXiv number of where it comes from.
    """

    name: PolicyName
    class_path: str
    num_queries: int
    kernel: Kernel | None
    weight: float | Literal["mix_lambda"] | None
    keeps: str
    paper: str | None


POLICIES: tuple[PolicySpec, ...] = (
    PolicySpec(
        name="rkv",
        class_path="rkv_vllm.policies.rkv:Rkv",
        num_queries=8,
        kernel="rkv",
        weight="mix_lambda",
        keeps="important and not redundant ones",
        paper="2505.24133",
    ),
    PolicySpec(
        name="invariant",
        class_path="rkv_vllm.policies.invariant:Invariant",
        num_queries=16,
        kernel="invariant",
        weight=0.4,
        keeps="important ones unlike the others, wherever they stand",
        paper=None,
    ),
    PolicySpec(
        name="snapkv",
        class_path="rkv_vllm.policies.rkv:Rkv",
        num_queries=8,
        kernel="rkv",
        weight=1.0,
        keeps="those that the newest tokens attend to",
        paper="2404.14469",
    ),
    PolicySpec(
        name="keydiff",
        class_path="rkv_vllm.policies.keydiff:KeyDiff",
        num_queries=0,
        kernel=None,
        weight=None,
        keeps="those whose keys differ from the mean key",
        paper="2504.15364",
    ),
    PolicySpec(
        name="recency",
        class_path="rkv_vllm.policies.recency:Recency",
        num_queries=0,
        kernel=None,
        weight=None,
        keeps="the first four and the newest",
        paper="2309.17453",
    ),
    PolicySpec(
        name="random",
        class_path="rkv_vllm.policies.random:Random",
        num_queries=0,
        kernel=None,
        weight=None,
        keeps="any, to compare with",
        paper=None,
    ),
)

POLICY_NAMES: tuple[PolicyName, ...] = tuple(policy.name for policy in POLICIES)
#: For requests, where nobody says.
DEFAULT_POLICY: PolicyName = "invariant"
#: The kernels that score each policy on GPUs; the policies that none do are not in it.
KERNELS: dict[PolicyName, Kernel] = {p.name: p.kernel for p in POLICIES if p.kernel is not None}
#: Newest tokens whose queries each policy looks at.
NUM_QUERIES: dict[PolicyName, int] = {policy.name: policy.num_queries for policy in POLICIES}
#: Queries of a request that workers keep: as many as any policy looks at.
RING_SIZE = max(NUM_QUERIES.values())


def markdown_table() -> str:
    """The table for the README."""
    rows = [
        f"| `{policy.name}` | {policy.keeps} | "
        + (f"[{policy.paper}](https://arxiv.org/abs/{policy.paper}) |" if policy.paper else "|")
        for policy in POLICIES
    ]
    return "\n".join(["| policy | keeps tokens: | paper |", "|---|---|---|", *rows])
