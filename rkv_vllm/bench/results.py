"""What `rkv-vllm bench` writes: JSON that holds everything its tables and plots are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from rkv_vllm.bench.kernel_time import KernelTime
from rkv_vllm.bench.roofline import HardwareLimits, ModelShape
from rkv_vllm.bench.rows import Entry, Group, Kind, Row
from rkv_vllm.bench.window import Point, Window
from rkv_vllm.settings.error_text import explain


class Measure(BaseModel):
    """How a load is measured.

    Attributes:
        windows: consecutive windows of each load.
        window_seconds: length of a window, in whole steps; `window_steps`, where given, goes before it.
        settle_steps: steps in which as many requests run as in those before, once the load is steady.
        settle_seconds: time after which the load is measured as it is, and the result says so.
        profile_steps: steps recorded with the profiler behind an engine's last load; 0: it is not set up.
    """

    windows: int = 3
    window_seconds: float = 10.0
    window_steps: int | None = None
    settle_steps: int = 64
    settle_seconds: float = 20.0
    profile_steps: int = 0


class LoadResult(BaseModel):
    """One row on one engine.

    Attributes:
        entry: how the first requests came by their age; None for a batch, whose requests are all new.
        first_requests: requests given an age; `backlog` more waited behind them.
        fill_seconds, fill_prompt_tokens: until the first requests ran; before any window.
        steady: whether the load was steady when the first window began; `settle_seconds`: how long that took.
        pool_whole: whether all pages were back in the pool when the load had been aborted; None where its
            requests stayed for the next one.
        failure: why there are no windows, or fewer.
    """

    row: str
    entry: Entry | None
    first_requests: int = 0
    backlog: int = 0
    fill_seconds: float = 0.0
    fill_prompt_tokens: int = 0
    settle_seconds: float = 0.0
    steady: bool = False
    windows: list[Window] = []
    curve: list[Point] = []
    kernel_time: KernelTime | None = None
    pool_whole: bool | None = None
    failure: str | None = None


class EngineFacts(BaseModel):
    """What an engine says of itself when it has started; `pool_pages`: that requests can hold."""

    shape: ModelShape
    model: str
    pool_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_caching: bool
    async_scheduling: bool
    cudagraph_mode: str
    largest_graph: int | None
    start_seconds: float


class EngineRun(BaseModel):
    """One engine from start to end; `facts` None: it did not start, and `failure` says why."""

    kind: Kind
    arguments: list[str]
    facts: EngineFacts | None = None
    loads: list[LoadResult] = []
    failure: str | None = None


#: Files of results keep the names that their fields were first written under.
_FILE_FORMAT = ConfigDict(serialize_by_alias=True)


class Device(BaseModel):
    """`memory_gib`, `limits`: None on a CPU."""

    model_config = _FILE_FORMAT

    name: str
    memory_gib: float | None = None
    limits: HardwareLimits | None = Field(
        default=None, validation_alias=AliasChoices("limits", "ceilings"), serialization_alias="ceilings"
    )


class Results(BaseModel):
    model_config = _FILE_FORMAT

    command: str
    started: str
    versions: dict[str, str]
    platform: str
    device: Device
    group: Group
    measure: Measure
    runs: list[EngineRun] = Field(
        default=[], validation_alias=AliasChoices("runs", "lives"), serialization_alias="lives"
    )

    @property
    def engines(self) -> tuple[str | float | None, ...]:
        """What runs have in common whose figures may be compared."""
        group = self.group
        return (
            group.model and Path(group.model).name,
            group.memory_gib,
            group.engine,
            group.stock_engine,
            group.rkv_engine,
            self.device.name,
        )

    def row(self, name: str) -> Row:
        """Raises: ValueError where there is none of that name."""
        rows = {row.name: row for row in self.group.rows}
        if name not in rows:
            raise ValueError(f"row: none is called {name}, but {', '.join(rows)}")
        return rows[name]

    def loads_of(self, run: EngineRun, row: Row) -> list[LoadResult]:
        """What a run measured of a row, or of one that is the same load to its kind of engine."""
        names = {other.name for other in self.group.rows if row.is_like(other, run.kind)}
        return [load for load in run.loads if load.row in names]


def merge(results: Sequence[Results]) -> Results:
    """Results of the same engines as one: a long group may be measured in parts, or again.

    Rooflines are of the highest limits that were measured; `measure` is that of the first run.

    Raises: ValueError where they differ in engines or device, or mean different loads by one name.
    """
    first = results[0]
    if any(each.engines != first.engines for each in results):
        raise ValueError("differ in model, memory, options or device")
    rows: dict[str, Row] = {}
    for row in (row for each in results for row in each.group.rows):
        if rows.setdefault(row.name, row) != row:
            raise ValueError(f"name different loads {row.name}")
    limits = [each.device.limits for each in results if each.device.limits is not None]
    highest = None
    if limits:
        highest = HardwareLimits(
            bytes_per_second=max(each.bytes_per_second for each in limits),
            operations_per_second=max(each.operations_per_second for each in limits),
        )
    return first.model_copy(
        update={
            "command": "\n".join(each.command for each in results),
            "device": first.device.model_copy(update={"limits": highest}),
            "group": first.group.model_copy(update={"rows": tuple(rows.values())}),
            "runs": [run for each in results for run in each.runs],
        }
    )


def read_results(path: Path) -> Results:
    """Raises: ValueError that names the file and what is wrong with it."""
    try:
        return Results.model_validate_json(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
