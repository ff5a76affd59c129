"""API keys: several, compared in constant time, in front of every route that is not explicitly public."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from hmac import compare_digest
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rkv_vllm.server.asgi import is_request, request_state, route_path
from rkv_vllm.server.errors import error_response

#: Digits of a key's SHA-256 that name it where its owner gave it no name.
NAME_DIGITS = 8


class ApiKeys:
    """The keys that open the server; only their hashes are kept."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, key: str, name: str | None = None) -> None:
        """Accept `key`. `name`, in logs and in settings for one key: default the start of its SHA-256."""
        digest = hashlib.sha256(key.encode()).digest()
        self._names[digest] = name or digest.hex()[:NAME_DIGITS]

    def read(self, file: Path) -> None:
        """Accept the keys of `file`: `KEY` or `NAME KEY` a line; blank lines and `# comments` are skipped.

        Raises: ValueError that names the line, and never shows a key; OSError.
        """
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            match line.split():
                case [] | ["#", *_]:
                    pass
                case [first, *_] if first.startswith("#"):
                    pass
                case [key]:
                    self.add(key)
                case [name, key]:
                    self.add(key, name)
                case _:
                    raise ValueError(f"{file}, line {number}: neither a key nor a name and a key")

    def name_of(self, key: str) -> str | None:
        """The name of `key`, or None for one that is not accepted; takes the same time for all."""
        presented = hashlib.sha256(key.encode()).digest()
        found = None
        for digest, name in self._names.items():
            if compare_digest(digest, presented):
                found = name
        return found


class Authentication:
    """ASGI middleware: 401 without a known key, except on the `public` paths and for CORS preflights.

    A key comes as `Authorization: Bearer KEY`, or as `x-api-key: KEY`, which Anthropic's clients send.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, public: Iterable[str]) -> None:
        self.app = app
        self._keys = keys
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope) or route_path(scope) in self._public or _is_preflight(scope):
            await self.app(scope, receive, send)
            return
        key = presented_key(Headers(scope=scope))
        name = None if key is None else self._keys.name_of(key)
        if name is None:
            problem = "No API key was given." if key is None else "The API key is not known."
            headers = {"WWW-Authenticate": "Bearer"}
            await error_response(401, problem, headers=headers)(scope, receive, send)
            return
        request_state(scope)["api_key"] = name
        await self.app(scope, receive, send)


def presented_key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None


def _is_preflight(scope: Scope) -> bool:
    """What a browser asks, without credentials, before a cross-origin request; vLLM answers it."""
    headers = Headers(scope=scope)
    asks = scope.get("method") == "OPTIONS" and "origin" in headers
    return asks and "access-control-request-method" in headers
