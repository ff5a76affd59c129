"""What the command `rkv-vllm bench` does with its options: choose rows, run them, show what came of it."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from rkv_vllm.bench.report import compare, show
from rkv_vllm.bench.results import Measure, Results, merge, read_results
from rkv_vllm.bench.rows import Group, read_groups
from rkv_vllm.settings.error_text import explain

#: Wide enough for the table where the output is no terminal.
FILE_WIDTH = 180


def choose(
    file: Path | None,
    name: str | None,
    only: Sequence[str],
    models: Path | None,
    load: dict[str, Any],
    *,
    memory_gib: float | None,
    lives: str | None,
    stock_engine: Sequence[str],
    rkv_engine: Sequence[str],
) -> Group:
    """The group to run: out of a file, or of the one load that options describe.

    Args:
        load: fields of `Row` that were given; in a group out of a file they replace those of every row.
        lives: kinds of engine, separated by commas.

    Raises: ValueError that names the option.
    """
    fields: dict[str, Any] = {}
    if file is not None:
        groups = read_groups(file)
        if name not in groups:
            raise ValueError(f"--group: one of {', '.join(groups)}")
        fields = groups[name].model_dump(exclude_unset=True)
        rows = [{**row, **load} for row in fields["rows"]]
        if unknown := set(only) - {row["name"] for row in rows}:
            raise ValueError(f"--only: no row named {', '.join(sorted(unknown))}")
        fields["rows"] = [row for row in rows if not only or row["name"] in only]
    elif name is not None or only:
        raise ValueError("--group and --only choose from a file: give --rows")
    else:
        fields["rows"] = [{"name": "load", **load}]
    if models is not None and fields.get("model") is not None:
        fields["model"] = str(models / fields["model"])
    if memory_gib is not None:
        fields["memory_gib"] = memory_gib
    if lives is not None:
        fields["lives"] = [kind.strip() for kind in lives.split(",")]
    for field, more in (("stock_engine", stock_engine), ("rkv_engine", rkv_engine)):
        if more:
            fields[field] = f"{fields.get(field, '')} {shlex.join(more)}"
    try:
        return Group.model_validate(fields)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def measure(
    group: Group,
    settings: Measure,
    *,
    extra: list[str],
    rounds: int,
    time_limit: float | None,
    log: Path | None,
    save: Path | None,
    title: str,
    as_json: bool,
    plots: Path | None,
) -> bool:
    """Runs the group and prints its comparisons; progress goes to standard error.

    Returns: whether something was measured of each row on each kind of engine.

    Raises: ValueError where an option cannot work; SystemExit, after a message, for one that vLLM does not
    know.
    """
    from rkv_vllm.bench.engine_arguments import check_arguments
    from rkv_vllm.bench.run import run_group

    if plots is not None:
        _need_matplotlib()
    check_arguments(group, extra)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    def keep(results: Results) -> None:
        if save is not None:
            save.parent.mkdir(parents=True, exist_ok=True)
            save.write_text(results.model_dump_json(indent=1) + "\n")

    log = log or (save.with_suffix(".log") if save is not None else Path("rkv-bench.log"))
    log.parent.mkdir(parents=True, exist_ok=True)
    results = run_group(
        group,
        settings,
        extra=extra,
        rounds=rounds,
        time_limit=time_limit,
        log=log,
        say=say,
        save=keep,
    )
    present([(title, results)], as_json, plots)
    for failure in dict.fromkeys(f"{run.kind}: {run.failure}" for run in results.runs if run.failure):
        print(failure, file=sys.stderr, flush=True)
    return all(
        set(each.sides) == {kind for kind in group.lives if each.row.runs_on(kind)}
        for each in compare(results)
    )


def show_files(files: Sequence[Path], as_json: bool, plots: Path | None) -> None:
    """Prints what files of results hold; those of the same engines and device are taken together.

    Raises: ValueError that names the file.
    """
    if plots is not None:
        _need_matplotlib()
    parts: dict[tuple[str | float | None, ...], list[tuple[Path, Results]]] = {}
    for file in files:
        results = read_results(file)
        parts.setdefault(results.engines, []).append((file, results))
    joined = []
    for part in parts.values():
        title = "+".join(file.stem for file, _ in part)
        try:
            joined.append((title, merge([results for _, results in part])))
        except ValueError as error:
            raise ValueError(f"{', '.join(str(file) for file, _ in part)}: {error}") from None
    present(joined, as_json, plots)


def present(results: Sequence[tuple[str, Results]], as_json: bool, plots: Path | None) -> None:
    """Prints comparisons, and writes plots where a folder is given."""
    if as_json:
        comparisons = [each for title, result in results for each in compare(result, title)]
        print(json.dumps([each.model_dump() for each in comparisons], indent=1))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
        for title, result in results:
            show(result, title, console)
    if plots is not None:
        from rkv_vllm.bench.plots import plot

        for path in plot(results, plots):
            print(path, file=sys.stderr)


def _need_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ValueError("--plots: matplotlib is not installed: pip install 'rkv-vllm[bench]'")
