"""The least time that a decoding step can take on a GPU (pure arithmetic).

Two phases follow each other in every layer. Matrix products read all weights once, whatever the number of
requests, and multiply them with each request's token: the larger of bytes over bandwidth and operations over
rate. Attention reads what each request holds in the KV cache: likewise. Compactions come besides, spread over
the steps of a buffer. Sampling, norms, writing the new token's keys and launching kernels are left out, and
so are prompts: nothing can be faster than this.
"""

from __future__ import annotations

from pydantic import BaseModel

from rkv_vllm.bench.load import requests_that_run, slots_on_average
from rkv_vllm.bench.rows import Kind, Row
from rkv_vllm.decisions.sizing import KvShape
from rkv_vllm.settings.config import CompactionSettings


class ModelShape(BaseModel):
    """A dense decoder with gated feed-forward layers, on one device."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied_embedding: bool
    element_bytes: int

    @property
    def multiplied_parameters(self) -> int:
        """Parameters that each token is multiplied with: all matrices, the embedding's look-up left out."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        feed_forward = 3 * self.hidden * self.intermediate
        return self.layers * (attention + feed_forward) + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, norms and biases left out."""
        embedding = 0 if self.tied_embedding else self.vocabulary * self.hidden
        return self.multiplied_parameters + embedding

    @property
    def kv(self) -> KvShape:
        return KvShape(self.layers, self.kv_heads, self.head_size, self.element_bytes)


class Ceilings(BaseModel):
    """What the GPU can do, measured: bytes a copy reads and writes, operations of a large product."""

    bytes_per_second: float
    operations_per_second: float


class StepFloor(BaseModel):
    """Milliseconds of one step in which `running` requests decode a token each."""

    running: float
    slots_per_request: float
    products: float
    attention: float
    compaction: float

    @property
    def milliseconds(self) -> float:
        return self.products + self.attention + self.compaction

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.running / self.milliseconds


def products_seconds(shape: ModelShape, ceilings: Ceilings, running: float) -> float:
    """All matrix products of a step."""
    read = shape.multiplied_parameters * shape.element_bytes / ceilings.bytes_per_second
    return max(read, 2 * running * shape.multiplied_parameters / ceilings.operations_per_second)


def attention_seconds(shape: ModelShape, ceilings: Ceilings, slots: float) -> float:
    """Attention of all requests over `slots` slots in all."""
    read = slots * shape.kv.bytes_per_token / ceilings.bytes_per_second
    operations = 4 * shape.layers * shape.heads * shape.head_size * slots
    return max(read, operations / ceilings.operations_per_second)


def compaction_seconds(shape: ModelShape, ceilings: Ceilings, budget: CompactionSettings) -> float:
    """One compaction of policy `rkv`: the similarity of every pair with a key that came since the one before,
    the keys read for it and for the window's attention twice, the survivors moved. Other policies do without
    the first."""
    heads, length = shape.layers * shape.kv_heads, budget.threshold
    key_bytes = heads * length * shape.head_size * shape.element_bytes
    moved = 4 * heads * budget.budget * shape.head_size * shape.element_bytes
    new_pairs = heads * (length**2 - budget.budget**2) * shape.head_size if budget.policy == "rkv" else 0
    return new_pairs / ceilings.operations_per_second + (2 * key_bytes + moved) / ceilings.bytes_per_second


def step_floor(shape: ModelShape, ceilings: Ceilings, row: Row, kind: Kind, running: float) -> StepFloor:
    """For `running` requests of the row's ages in an engine of this kind."""
    budget = row.budget_for(kind)
    slots = slots_on_average(row, budget)
    compaction = 0.0
    if budget is not None:
        due = sum(row.input + age >= budget.threshold for age in row.age_range) / len(row.age_range)
        compaction = running * due / budget.buffer * compaction_seconds(shape, ceilings, budget)
    return StepFloor(
        running=running,
        slots_per_request=slots,
        products=1000 * products_seconds(shape, ceilings, running),
        attention=1000 * attention_seconds(shape, ceilings, running * slots),
        compaction=1000 * compaction,
    )


def row_floor(
    shape: ModelShape,
    ceilings: Ceilings,
    row: Row,
    kind: Kind,
    *,
    pages: int,
    page_size: int,
    max_num_seqs: int,
) -> StepFloor:
    """For as many requests as the engine's own pool holds at their mean length."""
    running = requests_that_run(row, row.budget_for(kind), pages, page_size, max_num_seqs)
    return step_floor(shape, ceilings, row, kind, running)
