"""Which of vLLM's routes are open: an allow-list, so that a route of a later vLLM starts closed.

vLLM has routes for development, for its own machinery (elastic scaling, disaggregation) and for other
platforms; some reconfigure the server, and most are outside vLLM's own API key check.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from rkv_vllm.server.asgi import is_request, route_path
from rkv_vllm.server.errors import no_such_route

OPEN_ROUTES = (
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/v1/models",
    "/v1/kv_cache",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/responses/resp_{id}",
    "/v1/responses/resp_{id}/cancel",
    "/v1/messages",
    "/v1/messages/count_tokens",
)


class ClosedRoutes:
    """ASGI middleware: 404 for every path that matches none of `open_routes`, which may be templates."""

    def __init__(self, app: ASGIApp, open_routes: Iterable[str]) -> None:
        self.app = app
        self._open = [compile_path(route)[0] for route in open_routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_request(scope) and not self._is_open(route_path(scope)):
            await no_such_route()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_open(self, path: str | None) -> bool:
        return path is not None and any(route.fullmatch(path) for route in self._open)
