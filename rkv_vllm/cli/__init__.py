"""The command `rkv-vllm`, one file a subcommand.

What takes long to import, vLLM and torch first, is imported by the subcommand that needs it.
"""

from __future__ import annotations

import typer

from rkv_vllm import __version__
from rkv_vllm.cli import args, bench, demo, doctor, evaluate, fidelity, inspect, serve, top
from rkv_vllm.cli.options import RKV_SETTINGS, with_old_names, with_vllm_options

app = typer.Typer(
    name="rkv-vllm",
    help="R-KV decode-time KV cache compression inside stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Old names of options, with what they are called now.
SINGULARS = {"budget": "kv-budget", "buffer": "kv-buffer", "policy": "kv-policy"}
BARE = {field: RKV_SETTINGS.option_of(field).removeprefix("--") for field in RKV_SETTINGS.fields}
PLURALS = {
    "budgets": "kv-budget",
    "buffers": "kv-buffer",
    "policies": "kv-policy",
    "protects": "kv-protect",
}


def version() -> None:
    """Print the version."""
    typer.echo(__version__)


app.command(**with_vllm_options("vLLM's own"))(serve.serve)
app.command(context_settings=with_old_names(**BARE))(args.args)
app.command(**with_vllm_options("vLLM's own"))(doctor.doctor)
app.command(**with_vllm_options("the engine's own", **PLURALS))(fidelity.fidelity)
app.command(**with_vllm_options("the engine's own", **PLURALS))(inspect.inspect)
app.command("eval", **with_vllm_options("vLLM's own, for the engine in this process", **PLURALS))(
    evaluate.evaluate
)
app.command()(evaluate.eval_report)
app.command(**with_vllm_options("vLLM's own, for every engine", **SINGULARS))(bench.bench)
app.command()(top.top)
app.command()(demo.demo)
app.command()(version)
