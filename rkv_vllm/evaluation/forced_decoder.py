"""Makes an engine decode given tokens, and compares what it predicts with and without compaction.

vLLM gives custom logits processors the whole vocabulary's logits of every request, in both model runners. One
of them forces each next token and looks at the logits first. It is reached through this module, so that the
engine has to run in this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from rkv_vllm.decisions.messages import RESULT_KEY
from rkv_vllm.evaluation.fidelity import MEASURES, Schedule, schedule
from rkv_vllm.evaluation.fidelity_settings import Setting
from rkv_vllm.evaluation.fidelity_texts import Window
from rkv_vllm.host.command_line import engine_arguments
from rkv_vllm.settings.config import RkvConfig, extra_args

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

#: Key in `SamplingParams.extra_args`: which of the comparison's requests this is.
VARIANT = "fidelity_variant"
#: The one whose logits the others are compared with.
REFERENCE = -1
PROCESSOR = "rkv_vllm.evaluation.forced_decoder:TeacherForcing"


def compare(reference: torch.Tensor, logits: torch.Tensor, token: int) -> torch.Tensor:
    """Two predictions of a token.

    Args:
        reference, logits: [vocabulary], of the full and of the compacted cache.
        token: that follows in the text.

    Returns: float64 [MEASURES]: KL divergence of the reference's distribution from the other, in nats;
        whether the most likely token is the same; both log-probabilities of `token`.
    """
    full, own = (row.double().log_softmax(dim=-1) for row in (reference, logits))
    chances = full.exp()
    kl = torch.where(chances > 0, chances * (full - own), 0.0).sum()
    same = (reference.argmax() == logits.argmax()).double()
    return torch.stack((kl, same, full[token], own[token]))


class WindowComparison:
    """One window's forced tokens, and what was seen of each.

    Attributes:
        reference: float32 [tokens, vocabulary] in host memory: the logits of the full cache.
        seen: float64 [variants, tokens, MEASURES] on the engine's device; NaN where nothing was predicted.
        on_token: called for every token of every request once.
    """

    def __init__(self, window: Window, variants: int, on_token: Callable[[], None]) -> None:
        self._prompt, self._forced = len(window.prompt), window.forced
        self._variants = variants
        self._on_token = on_token
        self._done: set[tuple[int, int]] = set()
        self.reference = torch.empty(0)
        self.seen = torch.empty(0)

    def observe(self, logits: torch.Tensor, variant: int, length: int) -> None:
        """Looks at one request's logits, float32 [vocabulary], and leaves only the forced token possible.

        `length` is the request's tokens so far; within its prompt, nothing is predicted that is used. A token
        may be predicted again, by a prompt in chunks or after a preemption: the last time counts.
        """
        index = length - self._prompt
        if not 0 <= index < len(self._forced):
            return
        token = self._forced[index]
        if variant == REFERENCE:
            if not self.reference.numel():
                self.reference = torch.empty(len(self._forced), logits.shape[0])
            self.reference[index] = logits.to(self.reference)
        else:
            if not self.seen.numel():
                shape = (self._variants, len(self._forced), len(MEASURES))
                self.seen = torch.full(shape, torch.nan, dtype=torch.float64, device=logits.device)
            self.seen[variant, index] = compare(self.reference[index].to(logits.device), logits, token)
        logits.fill_(-torch.inf)
        logits[token] = 0.0
        if (variant, index) not in self._done:
            self._done.add((variant, index))
            self._on_token()


_comparison: WindowComparison | None = None


@contextmanager
def _comparing(comparison: WindowComparison) -> Iterator[None]:
    global _comparison
    _comparison = comparison
    try:
        yield
    finally:
        _comparison = None


class TeacherForcing(LogitsProcessorV2, LogitsProcessorV1):
    """Hands each request's logits to the comparison of the moment, in either model runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: By row of the batch (V1) or request slot (V2): which variant.
        self._variants: dict[int, int] = {}
        #: V1's rows: prompt tokens, and the list that vLLM appends output tokens to.
        self._tokens: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follows the rows of the batch."""
        if batch_update is None:
            return
        rows = {row: (self._variants[row], self._tokens[row]) for row in self._variants}
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            rows.pop(row, None)
            if params.extra_args and VARIANT in params.extra_args:
                rows[row] = (params.extra_args[VARIANT], (len(prompt or ()), output))
        for first, second, direction in batch_update.moved:
            a, b = rows.pop(first, None), rows.pop(second, None)
            if a is not None:
                rows[second] = a
            if b is not None and direction == MoveDirectionality.SWAP:
                rows[first] = b
        self._variants = {row: variant for row, (variant, _) in rows.items()}
        self._tokens = {row: tokens for row, (_, tokens) in rows.items()}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: follows the request slots."""
        self._variants.pop(req_idx, None)
        if sampling_params.extra_args and VARIANT in sampling_params.extra_args:
            self._variants[req_idx] = sampling_params.extra_args[VARIANT]
        return req_idx in self._variants

    def apply(self, logits: torch.Tensor, context: LogitsContext | None = None) -> torch.Tensor:
        if _comparison is None:
            return logits
        if context is None:
            for row, variant in self._variants.items():
                prompt, output = self._tokens[row]
                _comparison.observe(logits[row], variant, prompt + len(output))
        else:
            # Exact without speculation, which is refused.
            lengths = context.seq_lens_upper_bound_np.tolist()
            for row, slot in enumerate(context.idx_mapping_np.tolist()):
                if slot in self._variants:
                    _comparison.observe(logits[row], self._variants[slot], lengths[row])
        return logits


class ForcedDecoder:
    """An engine in this process, which reads windows under several settings.

    Attributes:
        engine: vLLM's, which may do other work between two windows.
    """

    def __init__(
        self,
        model: str,
        options: Sequence[str],
        config: RkvConfig,
        length: int,
        command: str = "fidelity",
    ) -> None:
        """Starts the engine.

        Args:
            model: as for vLLM.
            options: further engine options, as on vLLM's command line.
            config: the server-wide settings.
            length: tokens of a window, which is max_model_len unless the options say otherwise; -1: as many
                as model and memory allow.
            command: of `rkv-vllm`, for messages.

        Raises: ValueError for an option that cannot be combined with R-KV, or with which the engine would not
            run in this process.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.v1.engine.llm_engine import LLMEngine

        # Pages that another request has filled change the shapes of the arithmetic, and so its rounding.
        defaults = [model, f"--max-model-len={length}", "--no-enable-prefix-caching"]
        engine_args = engine_arguments(command, [*defaults, *options], config)
        engine_args.logits_processors = [*(engine_args.logits_processors or ()), PROCESSOR]
        if engine_args.tensor_parallel_size * engine_args.pipeline_parallel_size > 1:
            raise ValueError(
                "tensor_parallel_size, pipeline_parallel_size: predictions are compared in the "
                "engine's own process, which holds one device"
            )
        if engine_args.speculative_config is not None:
            raise ValueError("speculative_config: each token is given, so that there is nothing to draft")
        # -1 is vLLM's `auto`.
        if 0 < (engine_args.max_model_len or 0) < length:
            raise ValueError(
                f"--max-model-len: a window takes {length} tokens, not {engine_args.max_model_len}"
            )
        self._config = config
        self.engine: LLMEngine = LLMEngine.from_engine_args(engine_args)
        self._requests = 0

    @property
    def dtype(self) -> str:
        return str(self.engine.model_config.dtype).removeprefix("torch.")

    @property
    def reference_bytes(self) -> int:
        """Bytes of one forced token's logits."""
        return 4 * self.engine.model_config.get_vocab_size()

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        tokenizer = self.engine.get_tokenizer()
        return list(tokenizer.encode(text, add_special_tokens=special_tokens))

    def decode_window(
        self, window: Window, settings: Sequence[Setting], on_token: Callable[[], None]
    ) -> tuple[np.ndarray, list[Schedule]]:
        """Reads a window with the full cache, and then under all settings at once.

        Returns: float64 [settings, forced tokens, MEASURES], and when each setting compacts.

        Raises: RuntimeError where the engine did not decode the text, or compacted at other lengths than
            counts say.
        """
        comparison = WindowComparison(window, len(settings), on_token)
        with _comparing(comparison):
            self._run(window, {REFERENCE: None})
            schedules = self._run(window, dict(enumerate(settings)))
        measured = comparison.seen.cpu().numpy()
        if np.isnan(measured).any():
            raise RuntimeError("the engine did not show every prediction")
        return measured, schedules

    def close(self) -> None:
        self.engine.engine_core.shutdown()

    def _run(self, window: Window, settings: dict[int, Setting]) -> list[Schedule]:
        variants = {}
        for variant, setting in settings.items():
            params = SamplingParams(
                temperature=0.0,
                max_tokens=len(window.forced),
                ignore_eos=True,
                detokenize=False,
                extra_args={**extra_args(setting), VARIANT: variant},
            )
            self._requests += 1
            variants[str(self._requests)] = variant
            self.engine.add_request(str(self._requests), {"prompt_token_ids": list(window.prompt)}, params)
        schedules: dict[int, Schedule] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    variant = variants[output.request_id]
                    schedules[variant] = self._checked(window, settings[variant], output)
        return [schedules[variant] for variant in settings]

    def _checked(self, window: Window, setting: Setting, output: Any) -> Schedule:
        if tuple(output.outputs[0].token_ids) != window.forced:
            raise RuntimeError("the engine decoded other tokens than those of the text")
        result = output.kv_transfer_params[RESULT_KEY]
        planned = schedule(
            self._config.granularity, len(window.prompt), len(window.forced), setting, result["page_size"]
        )
        if planned.evicted_tokens != result["evicted_tokens"]:
            raise RuntimeError(
                f"the engine evicted {result['evicted_tokens']} tokens and not {planned.evicted_tokens}"
            )
        return planned
