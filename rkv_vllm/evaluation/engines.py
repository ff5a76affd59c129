"""What answers: vLLM in this process, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from rkv_vllm.evaluation.settings import FULL_CACHE, Setting
from rkv_vllm.evaluation.tasks import Decode
from rkv_vllm.evaluation.thinking import START
from rkv_vllm.provenance import device, versions
from rkv_vllm.server.protocol import FIELD, KvCacheReport
from rkv_vllm.server.request import FULL, XARGS
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.values import AUTO

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from vllm.v1.engine.async_llm import AsyncLLM

Prompt = str | Sequence[int]
SHUTDOWN_SECONDS = 30


class EngineError(Exception):
    """The engine cannot be used for this, or refused a request."""


@dataclass(frozen=True)
class Sampling:
    """How every answer is sampled.

    `max_tokens` None: what the context has room for; `chat`: whether texts are put into the model's chat
    template.
    """

    temperature: float
    top_p: float
    max_tokens: int | None
    chat: bool


@dataclass(frozen=True)
class Generation:
    """`opened_thinking`: whether the prompt ended with the start of the thinking."""

    output: str
    truncated: bool
    prompt_tokens: int
    output_tokens: int
    report: KvCacheReport
    opened_thinking: bool


class Engine(Protocol):
    """Attributes:
    facts: what it is, for the summary: versions, device, its own sampling defaults.
    """

    facts: dict[str, Any]

    async def generate(
        self, prompt: Prompt, setting: Setting, seed: int, decode: Decode | None
    ) -> Generation:
        """One answer.

        Args:
            prompt: a user's words, or the token ids of the whole prompt.
            seed: of the sampling; greedy answers need none.
            decode: the text of token ids; None: the model's tokenizer has to say.

        Raises: EngineError.
        """


@asynccontextmanager
async def in_process(
    model: str, arguments: list[str], config: RkvConfig, sampling: Sampling, *, with_metrics: bool = False
) -> AsyncIterator[ProcessEngine]:
    """Starts vLLM with R-KV.

    Args:
        arguments: options of `vllm serve`.
        config: the settings that all requests share.
        with_metrics: whether vLLM keeps its metrics, for somebody who reads them; they cost time in a step.

    Raises: ValueError for a wrong option; what vLLM raises where it cannot start.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    from rkv_vllm.host.command_line import engine_arguments

    engine_args = engine_arguments("eval", [model, *arguments], config)
    engine_args.disable_log_stats = not with_metrics
    engine = AsyncLLM.from_engine_args(engine_args)
    try:
        yield ProcessEngine(engine, sampling)
    finally:
        engine.shutdown(timeout=SHUTDOWN_SECONDS)
        # An exception that one of vLLM's imports kept holds this frame; the engine must not outlive Python.
        del engine


class ProcessEngine:
    def __init__(self, engine: AsyncLLM, sampling: Sampling) -> None:
        self._engine, self._sampling = engine, sampling
        self._names = map(str, count())
        # As a server of the model does: its authors' own top_k, and the like.
        self._defaults: dict[str, Any] = engine.model_config.get_diff_sampling_param()
        self.facts = {
            "versions": versions(),
            "device": device(),
            "dtype": str(engine.model_config.dtype).removeprefix("torch."),
            "sampling_defaults": self._defaults,
        }

    async def generate(
        self,
        prompt: Prompt,
        setting: Setting,
        seed: int,
        decode: Decode | None,
        *,
        max_tokens: int | None = None,
    ) -> Generation:
        """As `Engine` says; `max_tokens`: in place of the sampling's."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        ids, opened = self._encode(prompt)
        room = self._engine.model_config.max_model_len - len(ids)
        if room < 1:
            raise EngineError(f"a prompt of {len(ids)} tokens leaves no room: raise --max-model-len")
        params = SamplingParams.from_optional(
            **{
                **self._defaults,
                "temperature": self._sampling.temperature,
                "top_p": self._sampling.top_p,
                "max_tokens": min(room, max_tokens or self._sampling.max_tokens or room),
            },
            seed=seed if self._sampling.temperature > 0 else None,
            detokenize=decode is None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=setting.extra_args,
        )
        try:
            outputs = self._engine.generate(tokens_input(list(ids)), params, next(self._names))
            [result] = [output async for output in outputs]
        except VLLMClientError as error:
            raise EngineError(str(error)) from None
        completion = result.outputs[0]
        report = KvCacheReport.from_kv_transfer_params(result.kv_transfer_params)
        assert report is not None, "R-KV's scheduler reports on every request"
        return Generation(
            output=completion.text if decode is None else decode(completion.token_ids),
            truncated=completion.finish_reason == "length",
            prompt_tokens=len(ids),
            output_tokens=len(completion.token_ids),
            report=report,
            opened_thinking=opened,
        )

    def _encode(self, prompt: Prompt) -> tuple[Sequence[int], bool]:
        """Token ids of the whole prompt, and whether it ends with the start of the thinking."""
        if not isinstance(prompt, str):
            return prompt, False
        tokenizer: Any = self._engine.get_tokenizer()
        if not self._sampling.chat:
            return tokenizer.encode(prompt), False
        if tokenizer.chat_template is None:
            raise EngineError("the model has no chat template: --no-chat sends questions as they are")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False), text.rstrip().endswith(START)


@asynccontextmanager
async def on_server(base_url: str, model: str | None, sampling: Sampling) -> AsyncIterator[Engine]:
    """A running server, asked through the openai client; the key is that of OPENAI_API_KEY.

    Args:
        base_url: with or without the `/v1` at its end.
        model: a name that the server knows; None: the first one it lists.

    Raises: EngineError where it does not answer, or does not serve that model.
    """
    from openai import AsyncOpenAI, OpenAIError

    url = base_url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY", "unused")
    # An answer may wait in the server's queue, and take, as long as it wants.
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=None) as client:
        try:
            served = {card.id: card for card in (await client.models.list()).data}
            reported: Any = await client.with_options(base_url=url).get("/version", cast_to=object)
        except OpenAIError as error:
            raise EngineError(f"base-url: {url} does not answer as vLLM does: {error}") from None
        name = model if model is not None else next(iter(served))
        if name not in served:
            raise EngineError(f"model: {url} serves {', '.join(served)}, not {name}")
        facts = {
            "versions": {**versions(["openai"]), "server": reported["version"]},
            "served_model": name,
        }
        length: int = (served[name].model_extra or {})["max_model_len"]
        yield ServerEngine(client, name, length, sampling, facts)


class ServerEngine:
    def __init__(
        self, client: AsyncOpenAI, model: str, length: int, sampling: Sampling, facts: dict[str, Any]
    ) -> None:
        self._client, self._model, self._length, self._sampling = client, model, length, sampling
        self.facts = facts

    async def generate(
        self, prompt: Prompt, setting: Setting, seed: int, decode: Decode | None
    ) -> Generation:
        from openai import APIError

        sampling = self._sampling
        common: dict[str, Any] = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        if sampling.temperature > 0:
            common["seed"] = seed
        extra: dict[str, Any] = {XARGS: setting.extra_args}
        try:
            if isinstance(prompt, str) and sampling.chat:
                messages: Any = [{"role": "user", "content": prompt}]
                answer: Any = await self._client.chat.completions.create(
                    messages=messages, extra_body=extra, **common
                )
                output = answer.choices[0].message.content or ""
            else:
                if not isinstance(prompt, str):
                    extra["skip_special_tokens"] = False
                    common["max_tokens"] = min(
                        sampling.max_tokens or self._length, self._length - len(prompt)
                    )
                answer = await self._client.completions.create(prompt=prompt, extra_body=extra, **common)
                output = answer.choices[0].text
        except APIError as error:
            raise EngineError(f"the server refused or failed a request: {error}") from None
        report = _report(answer.model_extra)
        return Generation(
            output=output,
            truncated=answer.choices[0].finish_reason == "length",
            prompt_tokens=answer.usage.prompt_tokens,
            output_tokens=answer.usage.completion_tokens,
            report=report,
            opened_thinking=False,
        )


def _report(extra: dict[str, Any]) -> KvCacheReport:
    """The process of `rkv-vllm serve`, or of vLLM's own server with this package's flags."""
    if FIELD in extra:
        return KvCacheReport.model_validate(extra[FIELD])
    report = KvCacheReport.from_kv_transfer_params(extra.get("kv_transfer_params"))
    if report is None:
        raise EngineError("base-url: answers do not say what happened to the cache; R-KV is not on there")
    return report


def check_in_force(setting: Setting, generation: Generation) -> None:
    """Raises: EngineError where the engine used other settings than it was asked to."""
    report = generation.report
    protect = generation.prompt_tokens if setting.protect == "prompt" else setting.protect
    asked: tuple[Any, ...] = (setting.budget, None, setting.policy, setting.buffer, protect)
    if setting == FULL_CACHE:
        asked = (FULL, None, None, None, 0)
    elif setting.auto:
        asked = (AUTO, setting.budget, *asked[2:])
    used = (report.budget, report.min_budget, report.policy, report.buffer, report.protect or 0)
    if used != asked:
        raise EngineError(
            f"asked for budget, min_budget, policy, buffer and protection {asked}, the engine used {used}"
        )
