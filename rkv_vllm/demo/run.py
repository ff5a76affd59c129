"""Runs the demo: serves the model, streams the same question with four budgets, and prints what happened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openai import AsyncOpenAI
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rkv_vllm.demo import model as demo_model
from rkv_vllm.demo.server import serving
from rkv_vllm.server.protocol import FIELD, KvCacheReport
from rkv_vllm.server.request import FULL
from rkv_vllm.settings.policy_table import DEFAULT_POLICY
from rkv_vllm.settings.values import AUTO

BUDGETS: tuple[int | Literal["auto", "full"], ...] = (FULL, AUTO, 256, 128)
#: Of the request with budget `auto`.
MIN_BUDGET = 128
TOKENS = 800
PAGE_SIZE = 32
PROMPT = (
    "Write a long story about a lighthouse keeper who finds a message in a bottle. Describe the sea, the "
    "weather, the people of the village, and what the keeper decides to do."
)
SERVER_OPTIONS = [
    *("--dtype", "float32"),  # runs on every CPU; bfloat16 needs one made for it
    *("--block-size", str(PAGE_SIZE)),  # vLLM's pages of 128 on a CPU are too coarse to see anything
    *("--max-model-len", "2048"),
    *("--max-num-seqs", str(len(BUDGETS))),
    *("--max-num-batched-tokens", "512"),
    *("--kv-cache-memory-bytes", "100M"),  # so little that `auto` has to give some back
    *(
        "--distributed-executor-backend",
        "uni",
    ),  # one process less: starts sooner, leaves both cores to the model
    *("--stream-interval", "20"),  # tokens a chunk: fewer chunks leave more of two cores to the model
    "--enforce-eager",  # no compiler needed, and a quick start
    *("--shutdown-timeout", "0"),  # nothing runs any more when the demo stops it
    "--disable-log-stats",
    "--disable-uvicorn-access-log",
]


@dataclass
class Completion:
    """One streamed completion: its text so far and, at its end, what the server reported."""

    budget: int | Literal["auto", "full"]
    text: str = ""
    chunks: int = 0
    tokens: int = 0
    report: KvCacheReport | None = None
    unprinted: str = field(default="", repr=False)

    @property
    def title(self) -> str:
        return "full cache" if self.budget == FULL else f"budget {self.budget}"

    @property
    def asked(self) -> dict[str, Any]:
        """The object that the request carries."""
        return {"budget": self.budget} | ({"min_budget": MIN_BUDGET} if self.budget == AUTO else {})


async def stream(
    client: AsyncOpenAI, name: str, completion: Completion, on_text: Callable[..., None]
) -> None:
    """Stream one chat completion through the openai client, like any client of an OpenAI server."""
    chunks = await client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=TOKENS,
        temperature=0.7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"min_tokens": TOKENS, FIELD: completion.asked},
    )
    async for chunk in chunks:
        for choice in chunk.choices:
            completion.chunks += 1
            completion.text += choice.delta.content or ""
            on_text(completion, choice.delta.content or "")
        if chunk.usage is not None:
            completion.tokens = chunk.usage.completion_tokens
        if report := (chunk.model_extra or {}).get(FIELD):
            completion.report = KvCacheReport.model_validate(report)


async def stream_all(url: str, name: str, console: Console) -> list[Completion]:
    completions = [Completion(budget) for budget in BUDGETS]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=600, max_retries=0) as client:
        if console.is_terminal:
            with Live(panels(completions), console=console, refresh_per_second=8) as live:
                await asyncio.gather(
                    *(
                        stream(client, name, c, lambda *_: live.update(panels(completions)))
                        for c in completions
                    )
                )
        else:
            await asyncio.gather(
                *(stream(client, name, c, lambda c, text: print_lines(console, c, text)) for c in completions)
            )
            for completion in completions:
                print_lines(console, completion, "\n")
    return completions


def panels(completions: list[Completion], lines: int = 5) -> Group:
    """The newest lines of every text, side by side in time."""

    def newest(completion: Completion) -> Panel:
        text = Text(" ".join(completion.text[-2000:].split()))
        width = max(20, Console().width - 4)
        wrapped = text.wrap(Console(width=width), width)[-lines:]
        padding = [Text("")] * (lines - len(wrapped))
        done = completion.tokens or completion.chunks
        return Panel(
            Group(*wrapped, *padding), title=f"{completion.title}: {done} tokens", title_align="left"
        )

    return Group(*map(newest, completions))


def print_lines(console: Console, completion: Completion, text: str, width: int = 100) -> None:
    """Print streamed text where there is no terminal to redraw: full lines, each with its stream's name."""
    completion.unprinted += text
    while "\n" in completion.unprinted or len(completion.unprinted) > width:
        line, separator, rest = completion.unprinted.partition("\n")
        if len(line) > width:
            cut = line.rfind(" ", 0, width)
            cut = cut if cut > 0 else width
            line, rest = line[:cut], line[cut:].lstrip() + separator + rest
        completion.unprinted = rest
        if line.strip():
            console.print(f"{completion.title:>12} | {line}", markup=False, highlight=False, soft_wrap=True)


def table(completions: list[Completion]) -> Table:
    result = Table(
        title=f"Pages of {PAGE_SIZE} tokens; buffer 128, policy {DEFAULT_POLICY}",
        title_justify="left",
        title_style="none",
    )
    for column in (
        "tokens",
        "budget",
        "full cache up to",
        "compactions",
        "tokens evicted",
        "peak pages held",
        "pages without R-KV",
    ):
        result.add_column(column, justify="right")
    for completion in completions:
        report = completion.report
        assert report is not None
        result.add_row(
            str(completion.tokens),
            str(report.budget) if report.min_budget is None else f"{report.budget}, {report.min_budget}",
            "" if report.full_cache_tokens is None else str(report.full_cache_tokens),
            str(report.compactions),
            str(report.evicted_tokens),
            str(report.peak_pages),
            str(report.pages_without_compaction),
        )
    return result


def problems(completions: list[Completion]) -> list[str]:
    """What the demo promises and did not see."""
    found = []
    for completion in completions:
        report = completion.report
        if report is None:
            found.append(f"{completion.title}: the answer has no {FIELD} object")
        elif completion.tokens < TOKENS:
            found.append(f"{completion.title}: {completion.tokens} tokens instead of {TOKENS}")
        elif completion.budget == FULL and report.compactions:
            found.append(f"{completion.title}: {report.compactions} compactions")
        elif completion.budget != FULL and not report.compactions:
            found.append(f"{completion.title}: no compaction ({report.reason})")
    return found


def run(console: Console, model: Path | None = None, log: Path | None = None) -> None:
    """Run the whole demo.

    Raises: RuntimeError where the model cannot be prepared or an answer lacks what the demo shows;
    ServerError where the server fails.
    """
    started = time.monotonic()
    if model is None:
        if not demo_model.is_prepared(demo_model.default_directory()):
            console.print(f"Preparing {demo_model.NAME} (once: a download of 93 MB, then dequantisation) ...")
        model = demo_model.prepare()
    name = model.name
    log = log or demo_model.default_directory().parents[1] / "demo-server.log"
    with console.status("") as status:
        console.print(f"rkv-vllm serve {model} {' '.join(SERVER_OPTIONS)}", highlight=False, soft_wrap=True)
        ready: list[float] = []

        def waiting(seconds: float) -> None:
            status.update(f"vLLM is starting, {seconds:.0f} s (log: {log})")

        with serving(model, name, SERVER_OPTIONS, log, waiting) as url:
            status.stop()
            ready.append(time.monotonic())
            console.print(
                f"Server ready at {url} after {ready[0] - started:.0f} s. Asking four times: {PROMPT}\n"
            )
            completions = asyncio.run(stream_all(url, name, console))
            console.print(
                f"\n{sum(c.tokens for c in completions)} tokens in {time.monotonic() - ready[0]:.0f} s.\n"
            )
            if found := problems(completions):
                raise RuntimeError("; ".join(found))
            console.print(table(completions))
    console.print(f"Server stopped. {time.monotonic() - started:.0f} s in all.")


def describe(error: BaseException) -> str:
    detail: Any = getattr(error, "message", None) or str(error)
    return f"{type(error).__name__}: {detail}"
