"""The roofline: the least time that a decoding step can take on a GPU (pure arithmetic).

Two phases follow each other in every layer. Matrix products read all weights once, whatever the number of
requests, and multiply them with each request's token: the larger of bytes over bandwidth and operations over
rate. Attention reads what each request holds in the KV cache: likewise. Compactions come besides, spread over
the steps of a buffer. Sampling, norms, writing the new token's keys and launching kernels are left out, and
so are prompts: nothing can be faster than this.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from rkv_vllm.bench.load import requests_that_run, slots_on_average
from rkv_vllm.bench.rows import Kind, Row
from rkv_vllm.decisions.sizing import KvShape
from rkv_vllm.settings.config import CompactionSettings


class ModelShape(BaseModel):
    """A dense decoder with gated feed-forward layers, on one device.

    Attributes:
        element_bytes: of a weight.
        cache_element_bytes: of a key; None: as of a weight.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied_embedding: bool
    element_bytes: int
    cache_element_bytes: int | None = None

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
        element_bytes = self.cache_element_bytes or self.element_bytes
        return KvShape(self.layers, self.kv_heads, self.head_size, element_bytes)


class HardwareLimits(BaseModel):
    """What the GPU can do at most, measured: bytes a copy reads and writes, operations of a large product."""

    bytes_per_second: float
    operations_per_second: float


class StepRoofline(BaseModel):
    """Milliseconds of one step in which `running` requests decode a token each; `matmul`: matrix products."""

    model_config = ConfigDict(serialize_by_alias=True)

    running: float
    slots_per_request: float
    matmul: float = Field(serialization_alias="products")  # the name in printed JSON
    attention: float
    compaction: float

    @property
    def milliseconds(self) -> float:
        return self.matmul + self.attention + self.compaction

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.running / self.milliseconds


def matmul_seconds(shape: ModelShape, limits: HardwareLimits, running: float) -> float:
    """All matrix products of a step."""
    read = shape.multiplied_parameters * shape.element_bytes / limits.bytes_per_second
    return max(read, 2 * running * shape.multiplied_parameters / limits.operations_per_second)


def attention_seconds(shape: ModelShape, limits: HardwareLimits, slots: float) -> float:
    """Attention of all requests over `slots` slots in all."""
    read = slots * shape.kv.bytes_per_token / limits.bytes_per_second
    operations = 4 * shape.layers * shape.heads * shape.head_size * slots
    return max(read, operations / limits.operations_per_second)


def compaction_seconds(shape: ModelShape, limits: HardwareLimits, settings: CompactionSettings) -> float:
    """One compaction of policy `rkv`: the similarity of every pair with a key that came since the one before,
    the keys read for it and for the window's attention twice, the survivors moved. Other policies do without
    the first."""
    heads, length = shape.layers * shape.kv_heads, settings.threshold
    key_bytes = heads * length * shape.head_size * shape.kv.element_bytes
    moved = 4 * heads * settings.budget * shape.head_size * shape.kv.element_bytes
    new_pairs = heads * (length**2 - settings.budget**2) * shape.head_size if settings.policy == "rkv" else 0
    return new_pairs / limits.operations_per_second + (2 * key_bytes + moved) / limits.bytes_per_second


def step_roofline(
    shape: ModelShape, limits: HardwareLimits, row: Row, kind: Kind, running: float
) -> StepRoofline:
    """The roofline of `running` requests of the row's ages in an engine of this kind."""
    budget = row.budget_for(kind)
    slots = slots_on_average(row, budget)
    compaction = 0.0
    if budget is not None:
        due = sum(row.input + age >= budget.threshold for age in row.age_range) / len(row.age_range)
        compaction = running * due / budget.buffer * compaction_seconds(shape, limits, budget)
    return StepRoofline(
        running=running,
        slots_per_request=slots,
        matmul=1000 * matmul_seconds(shape, limits, running),
        attention=1000 * attention_seconds(shape, limits, running * slots),
        compaction=1000 * compaction,
    )


def row_roofline(
    shape: ModelShape,
    limits: HardwareLimits,
    row: Row,
    kind: Kind,
    *,
    pages: int,
    page_size: int,
    max_num_seqs: int,
) -> StepRoofline:
    """The roofline of as many requests as the engine's own pool holds at their mean length."""
    running = requests_that_run(row, row.budget_for(kind), pages, page_size, max_num_seqs)
    return step_roofline(shape, limits, row, kind, running)
