"""Compares what the engines measured, row by row: medians, ratios, rooflines, and a table of them (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from rkv_vllm.bench.kernel_time import KernelTime
from rkv_vllm.bench.results import EngineFacts, LoadResult, Results
from rkv_vllm.bench.roofline import StepRoofline, row_roofline
from rkv_vllm.bench.rows import COMPACTING, Entry, Kind, Row
from rkv_vllm.bench.window import Window


class Side(BaseModel):
    """One kind of engine on one row: medians over all windows of all its runs.

    Attributes:
        spread: the fastest window's tokens/s less the slowest's, over the median.
        compaction_share: compactions' time on the device over the time of a step.
        roofline: what the engine's own pool and the device allow; None on a CPU, and for a batch.
        share_of_roofline: tokens/s over those of the roofline.
        kept_share: slots of the pages in use over tokens of the requests that run; about 1 with full caches.
        token_p99, first_token_p99: seconds from token to token and from asking to the first, of which one in
            a hundred takes longer; medians over windows; None in older files.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    kind: Kind
    entry: Entry | None
    windows: int
    tokens_per_second: float
    slowest: float
    fastest: float
    spread: float
    running: float
    step_milliseconds: float
    compaction_milliseconds: float
    compaction_share: float
    pool_use: float
    pages_per_request: float
    kv_bytes_per_request: float
    preemptions: int
    recomputed_tokens: int
    prompt_tokens: int
    compactions: int
    client_share: float
    kept_share: float | None
    token_p99: float | None
    first_token_p99: float | None
    steady: bool
    roofline: StepRoofline | None = Field(serialization_alias="floor")
    share_of_roofline: float | None = Field(serialization_alias="of_floor")
    kernel_time: KernelTime | None


class Comparison(BaseModel):
    """A row. `ratio`, `memory_ratio`, `floor_ratio`: R-KV over stock, both with their caches in the model's
    dtype; None where one is missing. `over_stock`: tokens/s of every other kind over those of stock."""

    group: str
    row: Row
    sides: dict[Kind, Side]
    ratio: float | None
    over_stock: dict[Kind, float]
    memory_ratio: float | None
    floor_ratio: float | None
    failures: list[str]

    @property
    def reached(self) -> bool | None:
        """Whether the row's target was; None where it has none or was not measured."""
        if self.row.target is None or self.ratio is None:
            return None
        return self.ratio >= self.row.target


def compare(results: Results, group: str = "") -> list[Comparison]:
    """One comparison a row, in the group's order. `group`: a title for its table."""
    return [_compare(results, row, group) for row in results.group.rows]


def each_side_once(comparisons: Iterable[Comparison]) -> Iterator[tuple[Row, Side]]:
    """Each side with its row; one that rows share, being one load to stock, with the first of them."""
    seen: list[Side] = []
    for comparison in comparisons:
        for side in comparison.sides.values():
            if side not in seen:
                seen.append(side)
                yield comparison.row, side


def _compare(results: Results, row: Row, group: str) -> Comparison:
    sides: dict[Kind, Side] = {}
    failures = []
    for kind in dict.fromkeys(run.kind for run in results.runs if row.runs_on(run.kind)):
        measured, troubles = [], []
        for run in results.runs:
            if run.kind != kind:
                continue
            loads = results.loads_of(run, row)
            troubles += [load.failure for load in loads if load.failure]
            if run.failure and not loads:
                troubles.append(run.failure)
            if run.facts is not None:
                measured += [(run.facts, load) for load in loads if load.windows]
        if not measured and not troubles:
            troubles.append("not run")
        failures += [f"{kind}: {trouble}" for trouble in troubles]
        if measured:
            sides[kind] = _side(results, row, kind, measured)
    over_stock: dict[Kind, float] = {}
    for kind in sides:
        speed = _over(sides, kind, lambda side: side.tokens_per_second)
        if kind != "stock" and speed is not None:
            over_stock[kind] = speed
    return Comparison(
        group=group,
        row=row,
        sides=sides,
        ratio=over_stock.get("rkv"),
        over_stock=over_stock,
        memory_ratio=_over(sides, "rkv", lambda side: side.kv_bytes_per_request),
        floor_ratio=_over(
            sides, "rkv", lambda side: side.roofline.tokens_per_second if side.roofline else None
        ),
        failures=failures,
    )


def _over(sides: Mapping[Kind, Side], kind: Kind, of: Callable[[Side], float | None]) -> float | None:
    """A figure of one side over stock's."""
    if kind not in sides or "stock" not in sides:
        return None
    upper, lower = of(sides[kind]), of(sides["stock"])
    return upper / lower if upper and lower else None


def _side(results: Results, row: Row, kind: Kind, measured: Sequence[tuple[EngineFacts, LoadResult]]) -> Side:
    facts = measured[0][0]
    loads = [load for _, load in measured]
    windows = [window for load in loads for window in load.windows]
    speeds = [window.tokens_per_second for window in windows]
    speed = median(speeds)
    roofline = None
    # What is kept with budget auto depends on the load: no roofline is that of all.
    if results.device.limits is not None and row.batch is None and kind != "auto":
        roofline = row_roofline(
            facts.shape,
            results.device.limits,
            row,
            kind,
            pages=facts.pool_pages,
            page_size=facts.page_size,
            max_num_seqs=facts.max_num_seqs,
        )

    def middle(values: Iterable[float]) -> float:
        return median(values)

    compaction = middle(window.compaction_milliseconds_per_step for window in windows)
    pages = middle(window.pages_per_request for window in windows)
    return Side(
        kind=kind,
        entry=loads[0].entry,
        windows=len(windows),
        tokens_per_second=speed,
        slowest=min(speeds),
        fastest=max(speeds),
        spread=(max(speeds) - min(speeds)) / speed,
        running=middle(window.running for window in windows),
        step_milliseconds=middle(window.step_milliseconds for window in windows),
        compaction_milliseconds=compaction,
        compaction_share=middle(_compaction_share(window) for window in windows),
        pool_use=middle(window.pool_use for window in windows),
        pages_per_request=pages,
        kv_bytes_per_request=pages * facts.page_size * facts.shape.kv.bytes_per_token,
        preemptions=sum(window.preemptions for window in windows),
        recomputed_tokens=sum(window.recomputed_tokens for window in windows),
        prompt_tokens=sum(window.prompt_tokens for window in windows),
        compactions=sum(window.compactions for window in windows),
        client_share=max(window.client_share for window in windows),
        kept_share=_median_of(
            window.pages_per_request * facts.page_size / window.tokens_per_request
            for window in windows
            if window.tokens_per_request
        ),
        token_p99=_median_of(window.token_seconds.p99 for window in windows if window.token_seconds),
        first_token_p99=_median_of(
            window.first_token_seconds.p99 for window in windows if window.first_token_seconds
        ),
        steady=all(load.steady for load in loads),
        roofline=roofline,
        share_of_roofline=None if roofline is None else speed / roofline.tokens_per_second,
        kernel_time=next((load.kernel_time for load in loads if load.kernel_time), None),
    )


def _median_of(values: Iterable[float]) -> float | None:
    """None where there are none."""
    found = list(values)
    return median(found) if found else None


def _compaction_share(window: Window) -> float:
    return window.compaction_milliseconds_per_step / window.step_milliseconds


# -- for people ----------------------------------------------------------------------------------------------


def show(results: Results, group: str, console: Console) -> None:
    """Prints tables of one group; of one where nothing was measured, what went wrong alone."""
    comparisons = compare(results, group)
    device = results.device
    title = f"{group or 'bench'}: {_models(results)}, {device.name}"
    if results.group.memory_gib is not None:
        title += f", {results.group.memory_gib:g} GiB in all"
    table = Table(title=title, title_justify="left")
    for head in ("load", "engine"):
        table.add_column(head)
    for head in ("tokens/s", "spread", "running", "step ms", "floor ms", "of floor", "pool", "kept"):
        table.add_column(head, justify="right")
    for head in ("KV MiB/req.", "p99 ms", "first s", "compact.", "preempt.", "ratio", "floor", "target"):
        table.add_column(head, justify="right")
    for comparison in comparisons:
        for side in comparison.sides.values():
            table.add_row(*_cells(comparison, side))
        table.add_section()
    if any(comparison.sides for comparison in comparisons):
        console.print(table)
    if device.limits is not None:
        console.print(
            f"Floors at {device.limits.bytes_per_second / 1e12:.2f} TB/s and "
            f"{device.limits.operations_per_second / 1e12:.0f} TFLOP/s, measured in the same run."
        )
    for comparison in comparisons:
        for side in comparison.sides.values():
            for remark in remarks(comparison.row, side):
                console.print(f"{comparison.row.name}, {side.kind}: {remark}", markup=False, highlight=False)
        for failure in comparison.failures:
            console.print(f"{comparison.row.name}: {failure}", style="red", markup=False, highlight=False)
    for row, side in each_side_once(comparisons):
        if side.kernel_time is not None:
            console.print(_kernel_table(row, side, side.kernel_time))


def remarks(row: Row, side: Side) -> list[str]:
    """What a reader of the numbers has to know about how they came about."""
    said = []
    match side.entry:
        case "staggered" if row.max_age is not None:
            said.append(f"ages entered as prompts, at most {row.max_age} tokens of age each")
        case "compacted":
            said.append(
                "first requests entered with as many tokens as they would hold, not with their whole age"
            )
        case "fresh":
            said.append(f"first requests entered new, {row.warmup_tokens} tokens before measuring")
        case None:
            said.append(f"{row.batch} requests at once, from start to end, prompts included")
    if not side.steady and side.entry is not None:
        said.append("was not steady when measured")
    if side.client_share > 0.5:
        said.append(f"the measuring process was busy {side.client_share:.0%} of the time")
    return said


def _models(results: Results) -> str:
    return next(
        (run.facts.model.rsplit("/", 1)[-1] for run in results.runs if run.facts),
        results.group.model or "",
    )


def _cells(comparison: Comparison, side: Side) -> list[str]:
    is_rkv = side.kind == "rkv"
    ratio = comparison.over_stock.get(side.kind)
    target = f"{comparison.row.target:g}" if is_rkv and comparison.row.target else ""
    if is_rkv and comparison.reached is not None:
        target += " reached" if comparison.reached else " missed"
    return [
        comparison.row.name,
        side.kind,
        f"{side.tokens_per_second:,.0f}",
        f"{side.spread:.1%}",
        f"{side.running:,.1f}",
        f"{side.step_milliseconds:.2f}",
        "" if side.roofline is None else f"{side.roofline.milliseconds:.2f}",
        "" if side.share_of_roofline is None else f"{side.share_of_roofline:.0%}",
        f"{side.pool_use:.0%}",
        "" if side.kept_share is None else f"{side.kept_share:.0%}",
        f"{side.kv_bytes_per_request / 2**20:,.0f}",
        "" if side.token_p99 is None else f"{1000 * side.token_p99:.1f}",
        "" if side.first_token_p99 is None else f"{side.first_token_p99:.2f}",
        f"{side.compaction_share:.1%}" if side.kind in COMPACTING else "",
        str(side.preemptions),
        "" if ratio is None else f"{ratio:.2f}",
        f"{comparison.floor_ratio:.2f}" if is_rkv and comparison.floor_ratio else "",
        target,
    ]


def _kernel_table(row: Row, side: Side, spent: KernelTime) -> Table:
    title = f"{row.name}, {side.kind}: milliseconds a step by kernel, {spent.steps} steps"
    table = Table("class", "ms", "share", title=title, title_justify="left")
    for name, milliseconds in {**spent.classes, "idle": spent.idle}.items():
        table.add_row(name, f"{milliseconds:.3f}", f"{milliseconds / spent.span:.1%}")
    for kernel in spent.kernels[:10]:
        table.add_row(f"  {kernel.name[:70]}", f"{kernel.milliseconds_per_step:.3f}", kernel.in_class)
    return table
