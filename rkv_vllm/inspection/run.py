"""The command `rkv-vllm inspect`: answers a prompt under several settings, and records what is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

from rkv_vllm.evaluation.fidelity import MEASURES
from rkv_vllm.evaluation.fidelity_settings import settings_of
from rkv_vllm.evaluation.fidelity_texts import Window
from rkv_vllm.evaluation.fidelity_writer import NoChatTemplate, in_chat_template
from rkv_vllm.evaluation.forced_decoder import ForcedDecoder
from rkv_vllm.inspection.hooks import attach
from rkv_vllm.inspection.recorder import NO_MATCH, Record, Recorder
from rkv_vllm.inspection.report import Forgotten, Inspection, Packed, Run, Setting, first_difference
from rkv_vllm.provenance import device, versions
from rkv_vllm.settings.config import CompactionSettings, RkvConfig, extra_args
from rkv_vllm.settings.request_size import RequestSize

#: Says that so many tokens more are done; begins a step with its name and its tokens.
Advance = Callable[[int], None]
Step = Callable[[str, int], Advance]
#: Host memory, in bytes, that the full cache's logits of an answer may take while KL is measured.
MOST_REFERENCE_BYTES = 4 << 30


@dataclass(frozen=True)
class Plan:
    """What to inspect.

    Attributes:
        command: as it was given.
        prompt: a user's message, or with `chat` off the whole text.
        max_tokens: of an answer.
        ignore_eos: whether an answer goes on behind the model's end token.
        scores: whether scores are explained.
        kl: whether predictions are compared with the full cache's.
    """

    command: str
    model: str
    config: RkvConfig
    budgets: Sequence[int]
    buffers: Sequence[int]
    policies: Sequence[str]
    prompt: str
    chat: bool
    max_tokens: int
    ignore_eos: bool
    scores: bool
    kl: bool

    def settings(self, prompt_tokens: int) -> list[CompactionSettings]:
        """Every combination.

        Raises: ValueError that names the field of a value out of bounds.
        """
        size = RequestSize(prompt=prompt_tokens, longest=prompt_tokens + self.max_tokens)
        every = settings_of(self.config, size, self.budgets, self.buffers, self.policies)
        return [setting for setting in every if setting is not None]


def run(plan: Plan, options: Sequence[str], console: Console) -> Inspection:
    """Inspects, with a progress bar on the console.

    Args:
        plan: what.
        options: further engine options, as on vLLM's command line.
        console: for progress alone.

    Raises: ValueError that names a wrong option; RuntimeError where the engine did not do what was asked.
    """
    plan.settings(0)  # what is wrong with them is said before a model is loaded
    decoder = ForcedDecoder(plan.model, options, plan.config, -1, command="inspect")
    try:
        return _Inspector(plan, decoder, console).inspect()
    finally:
        decoder.close()


class _Inspector:
    def __init__(self, plan: Plan, decoder: ForcedDecoder, console: Console) -> None:
        self._plan = plan
        self._decoder = decoder
        self._console = console
        self._recorder = Recorder()
        self._names = count()
        [shape] = decoder.engine.collective_rpc(attach, args=(self._recorder,))
        self._layers, self._heads = shape

    def inspect(self) -> Inspection:
        plan, prompt = self._plan, self._prompt()
        settings = plan.settings(len(prompt))
        longest = len(prompt) + plan.max_tokens
        if longest > (most := self._decoder.engine.model_config.max_model_len):
            raise ValueError(
                f"--max-tokens: a prompt of {len(prompt)} and an answer of {plan.max_tokens} tokens exceed "
                f"the {most} that fit into the model and the memory"
            )
        with _progress(self._console) as step:
            full = self._answer(prompt, None, step("full cache", plan.max_tokens))
            runs = [_full_run(self._pieces([*prompt, *full]))]
            runs += [self._run(prompt, full, setting, step) for setting in settings]
        config = plan.config
        return Inspection(
            command=plan.command,
            model=plan.model,
            device=device(),
            dtype=self._decoder.dtype,
            versions=versions(),
            granularity=config.granularity,
            scope=config.scope,
            order=config.order,
            mix_lambda=config.mix_lambda,
            prompt_tokens=len(prompt),
            layers=self._layers,
            heads=self._heads,
            runs=runs,
        )

    def _prompt(self) -> list[int]:
        """Token ids."""
        if not self._plan.chat:
            return self._decoder.encode(self._plan.prompt, special_tokens=True)
        try:
            [tokens] = in_chat_template(self._decoder.engine, [self._plan.prompt])
        except NoChatTemplate as error:
            raise ValueError(f"--no-chat: {error}, and takes the prompt as it is") from None
        return tokens

    def _run(self, prompt: list[int], full: list[int], setting: CompactionSettings, step: Step) -> Run:
        name = f"{setting.policy}, {setting.budget} + {setting.buffer}"
        longest = len(prompt) + self._plan.max_tokens
        with self._recorder.recording(self._layers, self._heads, longest, self._plan.scores):
            answer = self._answer(prompt, setting, step(name, self._plan.max_tokens))
            record = self._recorder.record(len(prompt) + len(answer) - 1)  # the last token is never read
        difference = first_difference(answer, full)
        return Run(
            setting=Setting(
                policy=setting.policy, budget=setting.budget, buffer=setting.buffer, protect=setting.protect
            ),
            tokens=self._pieces([*prompt, *answer]),
            first_difference=None if difference is None else len(prompt) + difference,
            forgotten=_forgotten(record),
            kl=self._kl(prompt, answer, setting, step(f"{name}: KL", 2 * len(answer))),
        )

    def _answer(self, prompt: list[int], setting: CompactionSettings | None, advance: Advance) -> list[int]:
        """Greedy, by a request that runs alone."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self._plan.max_tokens,
            ignore_eos=self._plan.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args(setting),
        )
        engine, answer = self._decoder.engine, list[int]()
        engine.add_request(f"answer-{next(self._names)}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                answer += output.outputs[0].token_ids
                advance(len(output.outputs[0].token_ids))
        return answer

    def _kl(
        self, prompt: list[int], answer: list[int], setting: CompactionSettings, advance: Advance
    ) -> list[float] | None:
        size = len(answer) * self._decoder.reference_bytes
        if not self._plan.kl:
            return None
        if size > MOST_REFERENCE_BYTES:
            self._console.print(f"KL is left out: the full cache's predictions take {size / 2**30:.1f} GiB")
            return None
        window = Window("the answer", tuple(prompt), tuple(answer))
        measured, _ = self._decoder.decode_window(window, [setting], lambda: advance(1))
        return [float(f"{kl:.4g}") for kl in measured[0, :, MEASURES.index("kl")]]

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it; special tokens are shown."""
        tokenizer = self._decoder.engine.get_tokenizer()
        pieces: list[str] = []
        known: list[str] = []
        prefix = read = 0
        for token in tokens:
            new, text, prefix, read = detokenize_incrementally(tokenizer, [token], known, prefix, read)
            known += new
            pieces.append(text)
        return pieces


def _full_run(tokens: list[str]) -> Run:
    return Run(setting=None, tokens=tokens, first_difference=None, forgotten=None, kl=None)


def _forgotten(record: Record) -> Forgotten:
    def shares(values: np.ndarray | None) -> Packed | None:
        return None if values is None else Packed.pack(values)

    return Forgotten(
        rounds=list(record.rounds),
        left=Packed.pack(record.left),
        importance=shares(record.importance),
        redundancy=shares(record.redundancy),
        match=None if record.match is None else Packed.pack(record.match, missing=NO_MATCH),
    )


@contextmanager
def _progress(console: Console) -> Iterator[Step]:
    """A bar a step; yields what begins one with its name and tokens, and gives what advances it."""
    columns = (
        TextColumn("{task.description}, tokens"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def step(name: str, tokens: int) -> Advance:
            task = progress.add_task(name, total=tokens)
            return lambda count: progress.advance(task, count)

        yield step
