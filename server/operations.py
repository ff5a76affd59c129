"""What an operator sets, and everything it puts around vLLM's application, as one middleware."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from starlette.types import ASGIApp, Receive, Scope, Send

from rkv_vllm.server.access_log import AccessLog, access_logger
from rkv_vllm.server.auth import ApiKeys, Authentication
from rkv_vllm.server.lifecycle import Lifecycle
from rkv_vllm.server.limits import Limits, RequestLimits
from rkv_vllm.server.request_id import RequestId
from rkv_vllm.server.routes import ClosedRoutes, OpenRoutes, TrailingSlashes

PREFIX = "RKV_"
#: Seconds that running requests have after SIGTERM where `--shutdown-timeout` is not given.
SHUTDOWN_TIMEOUT = 30

Words = Annotated[list[str], NoDecode]
Positive = Annotated[int, Field(gt=0)]


class OperationSettings(BaseSettings):
    """Operation of the server: from arguments, or else from the environment (`RKV_API_KEYS` and so on)."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid")

    api_keys: Words = Field(default=[], repr=False, description="API keys, separated by commas.")
    api_key_file: Path | None = Field(
        default=None, description="File of API keys: `KEY` or `NAME KEY` a line, `#` for comments."
    )
    open_metrics: bool = Field(default=False, description="Answer /metrics without an API key.")
    open_routes: Words = Field(
        default=[], description="Further routes of vLLM to open, as in `/tokenize,/detokenize`."
    )
    limit_body_bytes: Positive = Field(default=64 << 20, description="Longest body of a request.")
    limit_max_tokens: Positive | None = Field(
        default=None, description="Most tokens a request may ask for, and gets if it asks for none."
    )
    limit_n: Positive | None = Field(
        default=None, description="Most answers a request may ask for: `n` times its prompts."
    )
    limit_concurrent: Positive | None = Field(
        default=None, description="Most requests that run at a time, in each API server process."
    )
    limit_concurrent_per_key: Positive | None = Field(default=None, description="The same for one API key.")
    access_log: Literal["text", "json"] = Field(
        default="text", description="`json`: one line of JSON a request; `text`: uvicorn's own lines."
    )

    @field_validator("api_keys", "open_routes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [word.strip() for word in value.split(",") if word.strip()]

    @field_validator("open_routes")
    @classmethod
    def _are_paths(cls, routes: list[str]) -> list[str]:
        if wrong := [route for route in routes if not route.startswith("/")]:
            raise ValueError(f"a route begins with a slash: {', '.join(wrong)}")
        return routes

    def to_environment(self) -> dict[str, str]:
        """The settings that were given, as the environment variables that give them again."""
        settings = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        return {
            f"{PREFIX}{name}".upper(): ",".join(value) if isinstance(value, list) else str(value)
            for name, value in settings.items()
        }

    def read_keys(self) -> ApiKeys:
        """Raises: OSError and ValueError where the file of keys cannot be read."""
        keys = ApiKeys()
        for key in self.api_keys:
            keys.add(key)
        if self.api_key_file is not None:
            keys.read(self.api_key_file)
            if not keys:
                raise ValueError(f"{self.api_key_file} holds no API key")
        return keys


def prepare(vllm: Namespace) -> None:
    """Bring the parsed options of `vllm serve` in line with the settings in the environment.

    API keys given to vLLM become ours, since vLLM checks them on some routes only; where a request names no
    length, vLLM's own `max_new_tokens` sets it, which also keeps it within the model's context.

    Raises: ValueError for options that would start a server without these guards, or with wrong settings.
    """
    if vllm.grpc or os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ValueError("vLLM's gRPC server and Rust front end take no middleware: they would be unguarded")
    settings = OperationSettings()
    given = [*(vllm.api_key or []), os.environ.pop("VLLM_API_KEY", "")]
    settings.api_keys = [*settings.api_keys, *(key for key in given if key)]
    if any("," in key for key in settings.api_keys):
        raise ValueError("an API key with a comma in it has to be in the file of keys")
    vllm.api_key = None
    settings.read_keys()
    os.environ.update(settings.to_environment())
    if settings.limit_max_tokens is not None:
        generation = dict(vllm.override_generation_config)
        least = min(settings.limit_max_tokens, generation.get("max_new_tokens", settings.limit_max_tokens))
        vllm.override_generation_config = {**generation, "max_new_tokens": least}
    if settings.access_log == "json":
        vllm.disable_uvicorn_access_log = True


class OperationsMiddleware:
    """ASGI middleware for vLLM's flag `--middleware`, the outermost one; set by the environment.

    A request passes, in this order: the access log, its id, readiness and stopping, the API keys, trailing
    slashes, the open routes, the limits.
    """

    def __init__(self, app: ASGIApp) -> None:
        settings = OperationSettings()
        open_routes = OpenRoutes(settings.open_routes)
        app = RequestLimits(app, _limits(settings))
        app = ClosedRoutes(app, open_routes)
        app = TrailingSlashes(app, open_routes)
        if keys := settings.read_keys():
            public = ["/health", "/ready", *(["/metrics"] if settings.open_metrics else [])]
            app = Authentication(app, keys, [*public, *(f"{path}/" for path in public)])
        app = Lifecycle(app)
        app = RequestId(app)
        if settings.access_log == "json":
            app = AccessLog(app, access_logger())
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def _limits(settings: OperationSettings) -> Limits:
    return Limits(
        body_bytes=settings.limit_body_bytes,
        max_tokens=settings.limit_max_tokens,
        n=settings.limit_n,
        concurrent=settings.limit_concurrent,
        concurrent_per_key=settings.limit_concurrent_per_key,
    )
