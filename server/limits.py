"""Limits on what one request may ask for and on how many may run at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkv_vllm.server.asgi import BodyTooLarge, ClientGone, is_request, read_body, replay, request_state
from rkv_vllm.server.errors import ErrorResponse, error_response
from rkv_vllm.server.json_body import UnfitBody, json_object
from rkv_vllm.settings.error_text import shown

#: Every name under which the APIs of OpenAI and Anthropic know the length of an answer.
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
#: Seconds after which a refused client may try again.
RETRY_AFTER = "1"
#: Methods that only look.
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True)
class Limits:
    """Limits of one API server process; None: no limit.

    Attributes:
        body_bytes: length of a request's body.
        max_tokens: tokens that a request may ask for, by any of `LENGTHS`.
        n: answers that a request may ask for: `n` times its prompts.
        concurrent: requests that run at a time.
        concurrent_per_key: requests of one API key that run at a time; all without a key count as one.
    """

    body_bytes: int
    max_tokens: int | None = None
    n: int | None = None
    concurrent: int | None = None
    concurrent_per_key: int | None = None

    def problem(self, asked: Mapping[str, Any]) -> tuple[str, str] | None:
        """The field of a body that is above a limit, and a sentence about it.

        What is no number is left for vLLM to refuse.
        """
        if self.max_tokens is not None:
            for field in LENGTHS:
                if (tokens := _integer(asked.get(field))) is not None and tokens > self.max_tokens:
                    return field, f"{field} is {shown(tokens)}, and this server allows {self.max_tokens}."
        if self.n is not None:
            n = max(_integer(asked.get("n")) or 1, 1)
            if n > self.n:
                return "n", f"n is {shown(n)}, and this server allows {self.n} answers at once."
            field, prompts = _prompts(asked)
            if n * prompts > self.n:
                return field, f"This asks for {n * prompts} answers at once, and this server allows {self.n}."
        return None


class RequestLimits:
    """ASGI middleware: 413 for a long body, 400 for one that is unfit or above a limit, 503 or 429 for one
    too many.

    A request runs, and counts, until its answer is complete, its client has gone or it has failed. Requests
    that only look are not limited.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope) or scope.get("method") in SAFE:
            await self.app(scope, receive, send)
            return
        key: str = request_state(scope).get("api_key", "")
        if (refusal := self._one_too_many(key)) is not None:
            await refusal(scope, receive, send)
            return
        self.running[key] += 1
        try:
            await self._run(scope, receive, with_retry_after(send))
        finally:
            self.running[key] -= 1
            if not self.running[key]:
                del self.running[key]

    def _one_too_many(self, key: str) -> ErrorResponse | None:
        headers = {"Retry-After": RETRY_AFTER}
        limit = self.limits.concurrent_per_key
        if limit is not None and self.running[key] >= limit:
            message = f"{limit} requests of this API key are running, which is the limit."
            return error_response(429, message, headers=headers)
        limit = self.limits.concurrent
        if limit is not None and self.running.total() >= limit:
            message = f"{limit} requests are running, which is this server's limit."
            return error_response(503, message, headers=headers)
        return None

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        try:
            body = await read_body(scope, receive, self.limits.body_bytes)
        except ClientGone:
            return
        except BodyTooLarge:
            message = f"The body is longer than {self.limits.body_bytes} bytes."
            await error_response(413, message)(scope, receive, send)
            return
        try:
            problem = self.limits.problem(json_object(body) or {})
        except UnfitBody as error:
            await error_response(400, str(error))(scope, receive, send)
            return
        if problem is not None:
            param, message = problem
            await error_response(400, message, param=param)(scope, receive, send)
            return
        await self.app(scope, replay(body, receive), send)


def with_retry_after(send: Send) -> Send:
    """`send` that adds Retry-After to a 429 or 503 without one, as vLLM's own limits answer."""

    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] in (429, 503):
            MutableHeaders(scope=message).setdefault("Retry-After", RETRY_AFTER)
        await send(message)

    return send_with_header


_INTEGER = TypeAdapter(int)


def _integer(value: Any) -> int | None:
    """`value` as vLLM's pydantic models read it, which take "5" and 5.0 for 5."""
    try:
        return _INTEGER.validate_python(value)
    except ValidationError:
        return None


def _prompts(asked: Mapping[str, Any]) -> tuple[str, int]:
    """The field that has most of a body's prompts, and how many prompts vLLM makes of the body.

    A completion has those of `prompt` and those of `prompt_embeds`; each of the `items` to score is one; the
    `messages` of a batch of chats are a list of conversations.
    """
    fields = ("prompt", "prompt_embeds", "items")
    counts = {field: _length(asked[field]) for field in fields if asked.get(field) is not None}
    messages = asked.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        counts["messages"] = len(messages)
    most = max(counts, key=counts.__getitem__, default="prompt")
    return most, max(sum(counts.values()), 1)


def _length(value: Any) -> int:
    """A list of integers is one prompt, given as tokens."""
    is_tokens = isinstance(value, list) and value and isinstance(value[0], int)
    return len(value) if isinstance(value, list) and not is_tokens else 1
