"""`rkv-vllm inspect`: what a cache forgets, as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rkv_vllm.cli import options
from rkv_vllm.cli.options import OptionGroup
from rkv_vllm.provenance import command_line
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.policy_table import DEFAULT_POLICY


@options.takes(OptionGroup("shared", RkvConfig, prefix="--kv-", names=(*options.SHARED_SETTINGS, "protect")))
def inspect(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Directory or name of the model.")],
    prompt: Annotated[str, typer.Option(help="What the model is asked.")],
    budgets: Annotated[str, typer.Option("--kv-budget", help="Budgets, separated by commas.")] = "512",
    policies: Annotated[
        str, typer.Option("--kv-policy", help="Policies, separated by commas.")
    ] = DEFAULT_POLICY,
    buffers: Annotated[str, typer.Option("--kv-buffer", help="Buffers, separated by commas.")] = "128",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 2048,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Let an answer go on behind the model's end token.")
    ] = False,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = True,
    scores: Annotated[
        bool, typer.Option(help="Explain scores; takes the time of a second round for each round.")
    ] = True,
    kl: Annotated[
        bool, typer.Option(help="Measure KL of every token; takes twice the time of an answer.")
    ] = True,
    out: Annotated[Path, typer.Option(help="File for the page.")] = Path("report.html"),
    *,
    shared: dict[str, Any],
    json: Annotated[bool, options.json("writing a page")] = False,
) -> None:
    """Show which tokens a cache has forgotten: by layer, KV head and round.

    The prompt is answered greedily with the full cache, and with every policy, budget and buffer, one after
    the other. The page needs nothing but a browser.
    """
    config = options.rkv_config(**shared)
    from rich.console import Console

    errors = Console(stderr=True)
    try:
        with options.vllm_on_stderr(level="ERROR"):
            from rkv_vllm.inspection.run import Plan, run

            plan = Plan(
                command=command_line(),
                model=model,
                config=config,
                budgets=options.integers("--kv-budget", budgets),
                buffers=options.integers("--kv-buffer", buffers),
                policies=[name.strip() for name in policies.split(",")],
                prompt=prompt,
                chat=chat,
                max_tokens=max_tokens,
                ignore_eos=ignore_eos,
                scores=scores,
                kl=kl,
            )
            found = run(plan, context.args, errors)
        if json:
            typer.echo(found.model_dump_json())
            return
        from rkv_vllm.inspection.page import page

        out.write_text(page(found), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    errors.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", highlight=False)
