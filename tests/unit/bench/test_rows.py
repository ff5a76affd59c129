"""Rows and groups as users write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rkv_vllm.bench.command import choose
from rkv_vllm.bench.rows import Group, Row, read_groups
from rkv_vllm.settings.config import CompactionSettings
from rkv_vllm.settings.error_text import explain

PUBLISHED = Path(__file__).parents[3] / "benchmarks" / "throughput.yaml"
NOTHING: dict[str, Any] = {"memory_gib": None, "lives": None, "stock_engine": [], "rkv_engine": []}


def test_the_published_groups_are_valid() -> None:
    """Proves that every group of the published runs reads, and that no target is lost."""
    groups = read_groups(PUBLISHED)
    targets = {row.name: row.target for group in groups.values() for row in group.rows if row.target}
    assert sorted(targets.values()) == [0.97, 1.0, 1.8, 3.0, 4.0, 4.5, 5.0, 6.0, 6.6]
    assert groups["overhead"].lives == ("stock", "off", "rkv")
    assert groups["llama8b-fp8"].lives == ("stock", "stock-fp8", "rkv", "rkv-fp8")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output": 0}, "output: Input should be greater than 0"),
        ({"budget": 8}, "budget: Input should be greater than 8"),
        ({"ages": (5, 5)}, "ages: from 0 on and growing, not 5 to 5"),
        ({"output": 100, "ages": (0, 101)}, "ages: up to output (100), not 101"),
        ({"concurrency": 1, "batch": 1}, "concurrency and batch: one of them"),
        ({"goes_on": True}, "goes_on: needs a concurrency to go on to"),
        ({"tokens": 1}, "tokens: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], said: str) -> None:
    """Proves that each wrong field is refused by its name."""
    with pytest.raises(ValidationError) as caught:
        Row(name="row", **fields)
    assert explain(caught.value) == said


def test_budgets_are_rkv_s_alone() -> None:
    """Proves that only R-KV's engines have a row's budget, and its way of entering."""
    row = Row(name="row", budget=64, buffer=16, policy="recency", rkv_entry="compacted")
    assert row.budget_for("rkv") == CompactionSettings(64, 16, "recency")
    assert row.budget_for("stock") is None and row.budget_for("off") is None
    assert [row.entry_for(kind) for kind in ("rkv", "stock", "off")] == [
        "compacted",
        "staggered",
        "staggered",
    ]
    assert Row(name="row", budget=None, rkv_entry="compacted").entry_for("rkv") == "staggered"


def test_kinds_in_fp8_are_the_others_with_another_cache() -> None:
    """Proves that they have the flags, budgets and loads of their like, and a cache in FP8."""
    row = Row(name="row", budget=64, rkv_entry="compacted")
    group = Group(engine="--seed 1", stock_engine="--stock", rkv_engine="--rkv", rows=(row,))
    for kind, like in (("stock-fp8", "stock"), ("rkv-fp8", "rkv")):
        assert row.budget_for(kind) == row.budget_for(like)
        assert row.entry_for(kind) == row.entry_for(like)
        first, second, own = group.arguments(like)
        assert group.arguments(kind) == [first, second, "--kv-cache-dtype=fp8", own]
        other = row.model_copy(update={"budget": 128})
        assert row.is_like(other, kind) == row.is_like(other, like)


def test_one_load_is_run_once() -> None:
    """Proves that rows which differ in what only R-KV sees are one load to stock, and others are not."""
    rows = (
        Row(name="a", budget=64),
        Row(name="b", budget=128, target=2.0),
        Row(name="c", budget=128, output=99),
        Row(name="d", budget=64, concurrency=3, kinds=("rkv",)),
    )
    group = Group(rows=rows)
    assert [row.name for row in group.rows_for("rkv")] == ["a", "b", "c", "d"]
    assert [row.name for row in group.rows_for("stock")] == ["a", "c"]
    with pytest.raises(ValidationError, match="each needs a name of its own"):
        Group(rows=(rows[0], rows[0]))


def test_choosing_from_a_file_and_from_options() -> None:
    """Proves that options replace fields of a file's rows, and describe one load without a file."""
    group = choose(
        PUBLISHED,
        "llama8b-a100",
        ["8K budget 1024"],
        Path("/shapes"),
        {"rkv_entry": "staggered"},
        memory_gib=24.0,
        lives="rkv, stock",
        stock_engine=[],
        rkv_engine=["--max-num-seqs=512"],
    )
    assert [(row.name, row.rkv_entry, row.output) for row in group.rows] == [
        ("8K budget 1024", "staggered", 8192)
    ]
    assert (group.model, group.memory_gib, group.lives) == (
        "/shapes/r1-distill-llama-8b",
        24.0,
        ("rkv", "stock"),
    )
    assert group.arguments("rkv")[-1] == "--max-num-seqs=512" != group.arguments("stock")[-1]
    (row,) = choose(None, None, [], None, {"input": 5}, **NOTHING).rows
    assert (row.name, row.input) == ("load", 5)


@pytest.mark.parametrize(
    ("file", "name", "only", "said"),
    [
        (PUBLISHED, "nothing", [], "--group: one of llama8b-a100, "),
        (PUBLISHED, "entry", ["x"], "--only: no row named x"),
        (None, "entry", [], "give --rows"),
        (Path("/nowhere"), "entry", [], "/nowhere: "),
    ],
)
def test_a_wrong_choice_names_the_option(file: Path | None, name: str, only: list[str], said: str) -> None:
    """Proves that a choice which cannot be made says which option is wrong."""
    with pytest.raises(ValueError) as caught:
        choose(file, name, only, None, {}, **NOTHING)
    assert said in str(caught.value)


def test_a_file_names_its_wrong_field(tmp_path: Path) -> None:
    """Proves that a mistake in a file is shown with file, place and field."""
    file = tmp_path / "rows.yaml"
    file.write_text("one:\n  rows:\n  - {name: x, output: -1}\n")
    with pytest.raises(ValueError, match=r"rows\.yaml: rows\.0\.output: Input should be greater than 0"):
        read_groups(file)
    file.write_text("- 1")
    with pytest.raises(ValueError, match=r"rows\.yaml: names groups"):
        read_groups(file)
