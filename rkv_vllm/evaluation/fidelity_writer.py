"""Lets the model write its own texts with the full cache, in the engine that then measures over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rkv_vllm.evaluation.fidelity_texts import OwnText, TextsToWrite, WrittenText, check_fits
from rkv_vllm.settings.config import extra_args

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


def write(
    engine: LLMEngine,
    asked: TextsToWrite,
    prompt: int,
    length: int,
    on_tokens: Callable[[int], None],
) -> OwnText:
    """Has all texts written in one batch, each as long as asked: its end is forbidden.

    Args:
        engine: that runs in this process, and has nothing else to do.
        prompt: most tokens of an instruction in the chat template.
        length: tokens of a text, its instruction among them.
        on_tokens: called with the number of tokens that the texts have more since the last call.

    Raises: ValueError where the model has no chat template, or an instruction is too long; RuntimeError where
        a text is not as long as asked.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    requests = asked.requests()
    try:
        prompts = in_chat_template(engine, [instruction for instruction, _ in requests])
    except NoChatTemplate as error:
        raise ValueError(f"--own-text: {error} to ask it with; give a --text instead") from None
    for (instruction, _), ids in zip(requests, prompts, strict=True):
        check_fits(instruction, len(ids), prompt)
    tokenizer = engine.get_tokenizer()
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    forbidden = sorted({token for token in named if token is not None})
    # As a server of the model does: its authors' own top_p, and the like.
    defaults = engine.model_config.get_diff_sampling_param()
    written: dict[str, list[int]] = {}
    for index, ((_, seed), ids) in enumerate(zip(requests, prompts, strict=True)):
        room = length - len(ids)
        params = SamplingParams.from_optional(
            **{**defaults, "temperature": asked.temperature, "max_tokens": room},
            seed=seed if asked.temperature > 0 else None,
            # No token that would stop the text is sampled before it has its length.
            min_tokens=room,
            stop_token_ids=forbidden,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args(None),
        )
        name = f"own-text-{index}"
        written[name] = []
        engine.add_request(name, {"prompt_token_ids": ids}, params)
        on_tokens(len(ids))
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = output.outputs[0].token_ids
            written[output.request_id] += tokens
            on_tokens(len(tokens))
    texts = [
        WrittenText(
            instruction=instruction,
            seed=seed,
            instruction_tokens=len(ids),
            tokens=[*ids, *own],
            text=tokenizer.decode(own),
        )
        for (instruction, seed), ids, own in zip(requests, prompts, written.values(), strict=True)
    ]
    if wrong := {len(text.tokens) for text in texts} - {length}:
        raise RuntimeError(f"the engine wrote texts of {sorted(wrong)} tokens, and not of {length}")
    return OwnText(
        model=engine.model_config.model,
        temperature=asked.temperature,
        seed=asked.seed,
        sampling_defaults=defaults,
        forbidden_tokens=forbidden,
        texts=texts,
    )


def check_tokenizer(engine: LLMEngine, own: OwnText) -> None:
    """Raises: ValueError where the model's tokens are not those that the texts were written in."""
    tokenizer = engine.get_tokenizer()
    for text in own.texts:
        if tokenizer.decode(text.tokens[text.instruction_tokens :]) != text.text:
            raise ValueError(
                f"--own-text-from: the texts were written by {own.model}, and the model's tokenizer "
                "reads their tokens as another text"
            )


class NoChatTemplate(Exception):
    """The model cannot be asked in the form that it was trained on."""


def in_chat_template(engine: LLMEngine, instructions: Sequence[str]) -> list[list[int]]:
    """Token ids of each instruction as a user's message, rendered as vLLM's server does.

    Raises: NoChatTemplate.
    """
    from vllm.renderers import ChatParams

    from rkv_vllm.host.moved import ChatTemplateResolutionError

    renderer = engine.renderer
    # The length is checked here, against the option that sets it.
    unlimited = replace(renderer.default_chat_tok_params, max_total_tokens=None)
    template = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
    messages = [[{"role": "user", "content": instruction}] for instruction in instructions]
    try:
        _, prompts = renderer.render_chat(messages, template, unlimited)
    except ChatTemplateResolutionError:
        raise NoChatTemplate("the model has no chat template") from None
    return [list(prompt["prompt_token_ids"]) for prompt in prompts]
