"""`rkv-vllm doctor`: what a server with these options would meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkv_vllm.cli import options
from rkv_vllm.cli.config_file import ConfigFile, vllm_arguments
from rkv_vllm.cli.server_settings import (
    KV_CACHE,
    OPERATION,
    kv_settings,
    operation_settings,
    refuse_unknown_variables,
)

if TYPE_CHECKING:
    from rich.console import Console

    from rkv_vllm.cli.diagnosis import Diagnosis, Row, Sizes


@options.takes(KV_CACHE, OPERATION)
def doctor(
    context: typer.Context,
    kv: dict[str, Any],
    operation: dict[str, Any],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a request, prompt and answer; default: max_model_len.")
    ] = None,
    json: Annotated[bool, options.json("tables")] = False,
    config: ConfigFile = None,
) -> None:
    """Say what `rkv-vllm serve MODEL ...` would meet: versions, what is refused, how many requests fit.

    Takes the arguments of `rkv-vllm serve`, starts nothing, and exits with 1 where something is refused.
    Without a MODEL it looks at the installation alone.
    """
    refuse_unknown_variables()
    settings, _ = kv_settings(kv)
    operation_settings(operation)
    from rkv_vllm.cli.diagnosis import diagnose

    try:
        with options.vllm_on_stderr(level="ERROR"):
            found = diagnose(vllm_arguments(context, config), settings.engine, length)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        from rich.console import Console

        show(found, Console())
    raise typer.Exit(1 if found.refused else 0)


def show(found: Diagnosis, console: Console) -> None:
    """Prints what was found as tables."""
    from rich.table import Table

    versions = Table(title="Installation", title_justify="left", show_header=False)
    for name, number in found.versions.items():
        versions.add_row(name, number)
    versions.add_row("platform", found.platform)
    console.print(versions)
    subject = "this configuration" if found.model else "this installation"
    if found.refused:
        console.print(f"R-KV refuses {subject}:", style="red")
        for problem in found.problems:
            console.print(f"  - {problem}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(f"R-KV works with {subject}.", style="green")
    if found.unknown is not None:
        console.print(found.unknown, markup=False, highlight=False)
    if found.sizes is not None:
        _show_sizes(found.sizes, console)


def _fit(row: Row) -> str:
    return f"{row.requests:,}" if row.requests else "none: the pool cannot hold one"


def _show_sizes(sizes: Sizes, console: Console) -> None:
    from rich.table import Table

    from rkv_vllm.cli.diagnosis import GIB

    console.print("What the model's config does not say of its layers is checked when it is loaded.")
    facts = Table(title="KV cache of one device", title_justify="left", show_header=False)
    facts.add_row(
        "KV bytes a token",
        f"{sizes.kv_bytes_per_token:,} (K and V, {sizes.layers} layers, {sizes.kv_heads} KV heads of "
        f"{sizes.head_size}, {sizes.dtype})",
    )
    if sizes.window_groups:
        facts.add_row(
            "groups of layers",
            f"{sizes.groups} of full attention, {sizes.window_groups} with windows, a page each",
        )
    facts.add_row("page", f"{sizes.page_size} tokens, {sizes.kv_bytes_per_token * sizes.page_size:,} bytes")
    size = "" if sizes.pool_bytes is None else f"{sizes.pool_bytes / GIB:.2f} GiB, "
    guess = "estimate: " if sizes.pool_is_estimate else ""
    facts.add_row("pool", f"{size}{sizes.pool_pages:,} pages ({guess}{sizes.pool_source})")
    console.print(facts)
    title = f"Requests of {sizes.length:,} tokens that fit"
    table = Table("cache", "tokens held", "pages", "requests", title=title, title_justify="left")
    for row in sizes.rows:
        kind = "full" if row.budget is None else f"budget {row.budget}, buffer {row.buffer}"
        kind = f"auto, at least {kind}" if row.auto else kind
        table.add_row(kind, f"{row.tokens_held:,}", f"{row.pages_per_request:,}", _fit(row))
    console.print(table)
    if len(sizes.rows) == 1:
        console.print("See what a budget does with --kv-budget TOKENS.")
    else:
        console.print("A prompt longer than budget + buffer is held whole until decoding begins.")
    if any(row.auto for row in sizes.rows):
        console.print("Requests with budget auto hold more, up to their full cache, while there is room.")
    fit = max(row.requests for row in sizes.rows)
    if fit > sizes.max_num_seqs:
        console.print(f"max_num_seqs lets {sizes.max_num_seqs:,} run at the same time.")
    run = min(fit, sizes.max_num_seqs)
    if sizes.largest_graph is not None and run > sizes.largest_graph:
        console.print(
            f"More than {sizes.largest_graph:,} requests would run without a CUDA graph: "
            f"--max-cudagraph-capture-size={run} captures larger ones."
        )
