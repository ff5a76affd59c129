"""Where every generation of the API server passes: vLLM's engine client, for one HTTP request at a time.

vLLM has many routes that generate, and no hook that sees them all. The one engine client behind them is
therefore wrapped, as an instance: `generate` gives a request the settings its caller may have, whatever route
it came by, and keeps the engine's report of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.utils import length_from_prompt_token_ids_or_embeds

from rkv_vllm.decisions.messages import REFUSAL_KEY, RESULT_KEY, CompactionResult
from rkv_vllm.decisions.result_sum import combined
from rkv_vllm.server.caller_rules import CallerRules
from rkv_vllm.server.protocol import KvCacheReport
from rkv_vllm.server.request import KvCacheError, read_xargs
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import XARGS_PREFIX, RequestedSettings


class RequestContext:
    """One HTTP request, as the generations that it starts see it.

    `settings` are those its body asks for, already checked against `rules`; None on routes whose bodies are
    not read, where each generation's own `vllm_xargs` are checked.
    """

    def __init__(self, rules: CallerRules, settings: RequestedSettings | None = None) -> None:
        self.rules = rules
        self.settings = settings
        self._results: list[CompactionResult] = []  # of its finished generations

    @property
    def report(self) -> KvCacheReport | None:
        """The sum over all finished generations: several prompts, or turns between tool calls."""
        return KvCacheReport.from_result(combined(self._results)) if self._results else None

    def apply(self, sampling_params: Any, size: RequestSize) -> None:
        """Write the settings of a generation of this size where the engine reads them.

        Raises: VLLMValidationError, which vLLM answers with HTTP 400, for what the rules do not allow.
        """
        given = sampling_params.extra_args or {}
        settings = settle(self.rules, self.settings, given, size)
        others = {key: value for key, value in given.items() if not key.startswith(XARGS_PREFIX)}
        sampling_params.extra_args = {**others, **settings.model_dump(exclude_none=True)}

    def keep(self, params: Mapping[str, Any] | None) -> None:
        """Remember the result in a finished output's `kv_transfer_params`, if it has one."""
        if params is not None and RESULT_KEY in params:
            self._results.append(params[RESULT_KEY])


def settle(
    rules: CallerRules, settings: RequestedSettings | None, xargs: Mapping[str, Any], size: RequestSize
) -> RequestedSettings:
    """`settings`, or where there are none what `xargs` asks for, in tokens.

    Raises: VLLMValidationError that names the wrong member of `kv_cache`, or the wrong key.
    """
    try:
        return rules.settle(settings or rules.resolve(read_xargs(xargs)), size)
    except KvCacheError as error:
        param = error.param(xargs=settings is None)
        raise VLLMValidationError(f"{param} {error}", parameter=param) from None


def size_of(prompt: Any, sampling_params: Any, max_model_len: int) -> RequestSize:
    """The size of what `generate` is given, which vLLM's routes have made into tokens or embeddings.

    Of a session whose input is streamed nothing is known but the limit; it keeps its full cache.
    """
    if not isinstance(prompt, Mapping):
        return RequestSize(prompt=0, longest=max_model_len)
    tokens = length_from_prompt_token_ids_or_embeds(
        prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
    )
    longest = max_model_len
    if sampling_params.max_tokens is not None:
        longest = min(tokens + sampling_params.max_tokens, max_model_len)
    return RequestSize(prompt=tokens, longest=longest)


_current: ContextVar[RequestContext | None] = ContextVar("rkv_request_context", default=None)


@contextmanager
def request_context(context: RequestContext) -> Iterator[None]:
    """Everything generated within, also by tasks that are started within, belongs to `context`."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def wrap(engine_client: Any) -> None:
    """Put this module between vLLM's routes and its engine client; called once for one client."""
    engine_client.generate = _generate(engine_client.generate, engine_client.model_config.max_model_len)


def _generate(
    generate: Callable[..., AsyncGenerator[Any, None]], max_model_len: int
) -> Callable[..., AsyncGenerator[Any, None]]:
    def generate_in_context(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        context = _current.get()
        if context is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        context.apply(sampling_params, size_of(prompt, sampling_params, max_model_len))
        return _with_report(generate(prompt, sampling_params, *args, **kwargs), context)

    return generate_in_context


async def _with_report(
    outputs: AsyncGenerator[Any, None], context: RequestContext
) -> AsyncGenerator[Any, None]:
    async with aclosing(outputs):  # closing this generator aborts the request, as it does without us
        async for output in outputs:
            if output.finished:
                if reason := (output.kv_transfer_params or {}).get(REFUSAL_KEY):
                    raise ValueError(f"The request {reason}")  # vLLM answers HTTP 400
                context.keep(output.kv_transfer_params)
            yield output
