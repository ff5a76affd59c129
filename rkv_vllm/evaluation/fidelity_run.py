"""The command `rkv-vllm fidelity`: gets the texts, runs the engine over their windows, and reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rkv_vllm.evaluation.fidelity import Report, row_of
from rkv_vllm.evaluation.fidelity_settings import Setting
from rkv_vllm.evaluation.fidelity_texts import GivenTexts, OwnText, Source, TextsToWrite, Window, cut
from rkv_vllm.evaluation.fidelity_writer import check_tokenizer, write
from rkv_vllm.evaluation.forced_decoder import ForcedDecoder
from rkv_vllm.provenance import device, versions
from rkv_vllm.settings.config import RkvConfig


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        command: as it was given.
        source: where the texts come from.
        settings: the control first.
        prompt, forced: tokens of a window that are read, and that are decoded.
        windows: most windows of each given text, or of all own texts.
        seed: of the bootstrap.
    """

    command: str
    model: str
    source: Source
    settings: Sequence[Setting]
    config: RkvConfig
    prompt: int
    forced: int
    windows: int
    seed: int


def run(plan: Plan, options: Sequence[str], console: Console) -> Report:
    """Measures, with a progress bar on the console.

    Args:
        plan: what.
        options: further engine options, as on vLLM's command line.
        console: for progress alone.

    Raises: ValueError that names a wrong option; RuntimeError where the engine did not do what was asked, so
        that there is nothing to report.
    """
    decoder = ForcedDecoder(plan.model, options, plan.config, plan.prompt + plan.forced)
    try:
        windows, own = _windows(plan, decoder, console)
        return _measure(plan, decoder, windows, own, console)
    finally:
        decoder.close()


def _windows(plan: Plan, decoder: ForcedDecoder, console: Console) -> tuple[list[Window], OwnText | None]:
    match plan.source:
        case GivenTexts(texts):
            prefix = decoder.encode("", special_tokens=True)
            windows: list[Window] = []
            for name, text in texts.items():
                windows += cut(name, decoder.encode(text), prefix, plan.prompt, plan.forced, plan.windows)
            return windows, None
        case TextsToWrite() as asked:
            length = plan.prompt + plan.forced
            with _progress("writing", asked.count * length, console) as advance:
                own = write(decoder.engine, asked, plan.prompt, length, advance)
        case OwnText() as own:
            check_tokenizer(decoder.engine, own)
    return own.windows(plan.prompt, plan.forced, plan.windows), own


@contextmanager
def _progress(what: str, tokens: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar for so many tokens; yields what is called with the number of further ones."""
    columns = (
        TextColumn(f"{what}, tokens"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=tokens)
        yield lambda count: progress.advance(task, count)


def _measure(
    plan: Plan, decoder: ForcedDecoder, windows: Sequence[Window], own: OwnText | None, console: Console
) -> Report:
    measured: list[np.ndarray] = []
    total = len(windows) * plan.forced * (len(plan.settings) + 1)
    with _progress("measuring", total, console) as advance:
        for window in windows:
            seen, schedules = decoder.decode_window(window, plan.settings, lambda: advance(1))
            measured.append(seen)
    together = np.stack(measured, axis=1)  # [settings, windows, tokens, measures]
    full_logprob = together[0, ..., 2].mean()
    return Report(
        command=plan.command,
        model=plan.model,
        device=device(),
        dtype=decoder.dtype,
        texts=list(plan.source.texts) if isinstance(plan.source, GivenTexts) else [],
        windows=len(windows),
        prompt_tokens=plan.prompt,
        forced_tokens=plan.forced,
        granularity=plan.config.granularity,
        scope=plan.config.scope,
        order=plan.config.order,
        mix_lambda=plan.config.mix_lambda,
        seed=plan.seed,
        full_perplexity=math.exp(-full_logprob),
        reference_bytes=decoder.reference_bytes * plan.forced,
        versions=versions(),
        rows=[
            row_of(setting, planned, together[index], plan.seed)
            for index, (setting, planned) in enumerate(zip(plan.settings, schedules, strict=True))
        ],
        own_text=own,
    )
