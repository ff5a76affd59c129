"""The command `rkv-vllm fidelity`: reads the texts, runs the engine over their windows, and reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rkv_vllm.evaluation.fidelity import Report, Window, cut, row_of
from rkv_vllm.evaluation.fidelity_settings import Setting
from rkv_vllm.evaluation.forced_decoder import ForcedDecoder
from rkv_vllm.provenance import device, versions
from rkv_vllm.settings.config import RkvConfig


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        command: as it was given.
        texts: files in UTF-8.
        settings: the control first.
        prompt, forced: tokens of a window that are read, and that are decoded.
        windows: most windows of each text.
        seed: of the bootstrap.
    """

    command: str
    model: str
    texts: Sequence[Path]
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

    Raises: ValueError that names a wrong option; OSError where a text cannot be read; RuntimeError where the
        engine did not do what was asked, so that there is nothing to report.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in plan.texts}
    decoder = ForcedDecoder(plan.model, options, plan.config, plan.prompt + plan.forced)
    try:
        prefix = decoder.encode("", special_tokens=True)
        windows: list[Window] = []
        for name, text in texts.items():
            windows += cut(name, decoder.encode(text), prefix, plan.prompt, plan.forced, plan.windows)
        return _measure(plan, decoder, windows, console)
    finally:
        decoder.close()


def _measure(plan: Plan, decoder: ForcedDecoder, windows: Sequence[Window], console: Console) -> Report:
    measured: list[np.ndarray] = []
    columns = (
        TextColumn("tokens"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = len(windows) * plan.forced * (len(plan.settings) + 1)
        task = progress.add_task("", total=total)
        for window in windows:
            seen, schedules = decoder.decode_window(window, plan.settings, lambda: progress.advance(task))
            measured.append(seen)
    together = np.stack(measured, axis=1)  # [settings, windows, tokens, measures]
    full_logprob = together[0, ..., 2].mean()
    return Report(
        command=plan.command,
        model=plan.model,
        device=device(),
        dtype=decoder.dtype,
        texts=[path.name for path in plan.texts],
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
    )
