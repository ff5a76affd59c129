"""What is to be measured: a row is a load, a group the rows that one engine can run one after another."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rkv_vllm.settings.config import AutoBudget, CompactionSettings, PolicyName
from rkv_vllm.settings.error_text import explain
from rkv_vllm.settings.policy_table import DEFAULT_POLICY
from rkv_vllm.settings.values import BudgetTokens, BufferTokens

#: An engine without R-KV, one whose requests have the row's budget, and one whose requests switch R-KV off;
#: the first two also with a KV cache in FP8; and one whose requests have it once memory is short.
Kind = Literal["stock", "rkv", "off", "stock-fp8", "rkv-fp8", "auto"]
STOCK: tuple[Kind, ...] = ("stock", "stock-fp8")
COMPACTING: tuple[Kind, ...] = ("rkv", "rkv-fp8", "auto")
IN_FP8: tuple[Kind, ...] = ("stock-fp8", "rkv-fp8")

#: How a request of some age comes into being; `load.entry_tokens` says what each means.
Entry = Literal["staggered", "compacted", "fresh"]

Count = Annotated[int, Field(gt=0, strict=True)]


class Row(BaseModel):
    """A load.

    Without `concurrency` or `batch` it is saturating: as many requests as the pool holds, and a few more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    input: Count = Field(default=128, description="Prompt tokens of a request.")
    output: Count = Field(default=2048, description="Output tokens of a request.")
    budget: BudgetTokens | None = Field(
        default=1024, description="R-KV's budget in tokens; none: full cache."
    )
    buffer: BufferTokens = Field(default=128, description="R-KV's buffer in tokens.")
    policy: PolicyName = Field(default=DEFAULT_POLICY, description="R-KV's policy.")
    concurrency: Count | None = Field(
        default=None, description="Requests at the same time; none: as many as the pool holds at mean length."
    )
    backlog: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=8, description="Requests beyond what the pool holds, without a fixed concurrency."
    )
    batch: Count | None = Field(
        default=None, description="In place of a steady state: requests sent at once, from start to end."
    )
    ages: tuple[int, int] | None = Field(
        default=None, description="Ages of the first requests, from (with) and to (without); none: all."
    )
    max_age: Count | None = Field(
        default=None,
        description="Ages beyond are folded back below it (modulo) in the prompts that stand for them.",
    )
    rkv_entry: Entry = Field(default="staggered", description="How R-KV's first requests come by their age.")
    warmup_tokens: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0, description="Steps to run before it is looked whether the load is steady."
    )
    goes_on: bool = Field(
        default=False,
        description="Whether requests of the row before stay: those that are missing come, the newest go.",
    )
    seed: int = 0
    kinds: tuple[Kind, ...] | None = Field(
        default=None, description="Kinds of engine that it is run on; none: all."
    )
    target: float | None = Field(default=None, gt=0, description="R-KV's tokens/s over stock's, at least.")

    @field_validator("ages")
    @classmethod
    def _ages_grow(cls, ages: tuple[int, int] | None) -> tuple[int, int] | None:
        if ages is not None and not 0 <= ages[0] < ages[1]:
            raise ValueError(f"from 0 on and growing, not {ages[0]} to {ages[1]}")
        return ages

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.ages is not None and self.ages[1] > self.output:
            raise ValueError(f"ages: up to output ({self.output}), not {self.ages[1]}")
        if self.concurrency is not None and self.batch is not None:
            raise ValueError("concurrency and batch: one of them")
        if self.goes_on and self.concurrency is None:
            raise ValueError("goes_on: needs a concurrency to go on to")
        return self

    def runs_on(self, kind: Kind) -> bool:
        return self.kinds is None or kind in self.kinds

    def is_like(self, other: Row, kind: Kind) -> bool:
        """Whether both are one load to an engine of this kind, which may know no budget."""
        if kind in COMPACTING:
            return self == other
        return self.model_copy(update=_R_KV_ALONE) == other.model_copy(update=_R_KV_ALONE)

    @property
    def length(self) -> int:
        """Tokens of a request when it ends."""
        return self.input + self.output

    @property
    def age_range(self) -> range:
        """Ages, in output tokens, of the requests that run at the same time."""
        return range(*(self.ages or (0, self.output)))

    def budget_for(self, kind: Kind) -> CompactionSettings | None:
        """The budget that a request has in an engine of this kind; None: full cache."""
        if kind not in COMPACTING or self.budget is None:
            return None
        auto = AutoBudget(max_budget=None, switch_at=None) if kind == "auto" else None
        return CompactionSettings(self.budget, self.buffer, self.policy, auto=auto)

    def entry_for(self, kind: Kind) -> Entry:
        """How the first requests come by their age in an engine of this kind."""
        return "staggered" if kind == "auto" or self.budget_for(kind) is None else self.rkv_entry


#: Fields that only R-KV's engines see, or none, and what is put there to compare the others.
_R_KV_ALONE = {
    "name": "",
    "budget": None,
    "buffer": 128,
    "policy": "rkv",
    "rkv_entry": "staggered",
    "warmup_tokens": 0,
    "kinds": None,
    "target": None,
}


class Group(BaseModel):
    """Rows for engines of one model with the same flags.

    `model`: a name or a folder; `engine`: options of `vllm serve` for every engine; `memory_gib`: GPU memory
    that an engine may take, whatever the GPU has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    memory_gib: float | None = Field(default=None, gt=0)
    engine: str = ""
    stock_engine: str = ""
    rkv_engine: str = ""
    lives: tuple[Kind, ...] = ("stock", "rkv")
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("rows: each needs a name of its own")
        return self

    def rows_for(self, kind: Kind) -> list[Row]:
        """What an engine of this kind runs: of rows that are one load to it, the first."""
        chosen: list[Row] = []
        for row in self.rows:
            if row.runs_on(kind) and not any(row.is_like(other, kind) for other in chosen):
                chosen.append(row)
        return chosen

    def arguments(self, kind: Kind) -> list[str]:
        """Options of `vllm serve` for an engine of this kind, R-KV's own left out."""
        cache = ["--kv-cache-dtype=fp8"] if kind in IN_FP8 else []
        extra = self.stock_engine if kind in STOCK else self.rkv_engine
        return [*shlex.split(self.engine), *cache, *shlex.split(extra)]


def read_groups(path: Path) -> dict[str, Group]:
    """Reads a YAML file: names to groups.

    Raises: ValueError that names the file and each wrong field.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: names groups, each with rows")
    try:
        return {name: Group.model_validate(group) for name, group in content.items()}
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
