"""Which of vLLM's routes are open: an allow-list, so that a route of a later vLLM starts closed.

vLLM has routes for development, for its own machinery (elastic scaling, disaggregation) and for other
platforms; some reconfigure the server, and most are outside vLLM's own API key check.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from starlette.responses import RedirectResponse
from starlette.routing import Route, WebSocketRoute, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from rkv_vllm.server.asgi import is_request, route_path
from rkv_vllm.server.errors import ErrorResponse, error_response, no_such_route
from rkv_vllm.settings.error_text import shown_name

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM sets up its own loggers only

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


#: Those of the open ones that are not vLLM's.
OWN_ROUTES = frozenset({"/ready", "/v1/kv_cache"})
METRICS = "/metrics"


class OpenRoutes:
    """The paths that match one of `OPEN_ROUTES`, or of the templates that an operator adds."""

    def __init__(self, further: Iterable[str] = ()) -> None:
        self.further = tuple(further)
        self._patterns = [compile_path(route)[0] for route in (*OPEN_ROUTES, *self.further)]

    def __contains__(self, path: str) -> bool:
        return any(pattern.fullmatch(path) for pattern in self._patterns)


class TrailingSlashes:
    """ASGI middleware: sends a client that wrote slashes behind an open path to the path without them.

    vLLM's router does so, with the same status. Here it is done before anything further in compares the path,
    and behind the API keys. `/metrics/` is answered at once, as by vLLM: not every scraper follows.
    """

    def __init__(self, app: ASGIApp, open_routes: OpenRoutes) -> None:
        self.app = app
        self._open = open_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope) if scope["type"] == "http" else None
        if path is None or not path.endswith("/") or path.rstrip("/") not in self._open:
            await self.app(scope, receive, send)
            return
        whole: str = scope["path"].rstrip("/")
        if path.rstrip("/") == METRICS:
            await self.app({**scope, "path": whole}, receive, send)
            return
        query = scope["query_string"].decode("latin-1")
        location = quote(whole) + (f"?{query}" if query else "")
        await RedirectResponse(location)(scope, receive, send)


class ClosedRoutes:
    """ASGI middleware: 404 for every path that is not open; where vLLM has a route there, it says how to open
    it. At start it logs which of vLLM's routes are open and which are not."""

    def __init__(self, app: ASGIApp, open_routes: OpenRoutes) -> None:
        self.app = app
        self._open = open_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            if scope["type"] == "lifespan":
                self._announce(_routes(scope["app"]))
        elif (path := route_path(scope)) is None or path not in self._open:
            await self._refusal(scope, path)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, path: str | None) -> ErrorResponse:
        if path is None or scope.get("method") == "OPTIONS":  # CORS preflights need no API key
            return no_such_route()
        routes = [route.path for route in _routes(scope["app"]) if route.path_regex.fullmatch(path)]
        if not routes:
            return no_such_route()
        return error_response(
            404,
            f"{shown_name(path)} is closed on this server: "
            f"--open-routes {routes[0]} (RKV_OPEN_ROUTES) opens it.",
        )

    def _announce(self, routes: list[Route | WebSocketRoute]) -> None:
        templates = [*OPEN_ROUTES, *self._open.further]
        open_ones = [each for each in templates if each in OWN_ROUTES or _leads_somewhere(each, routes)]
        examples = [_example(each) for each in open_ones]
        paths = sorted({route.path for route in routes if not any(map(route.path_regex.fullmatch, examples))})
        logger.info("Of the routes listed above these are open: %s", ", ".join(open_ones))
        logger.info("These are closed until --open-routes names them: %s", ", ".join(paths))
        for route in self._open.further:
            if route not in open_ones:
                logger.warning("--open-routes: vLLM has no route %s with these options", shown_name(route))


def _routes(app: Any) -> list[Route | WebSocketRoute]:
    return [route for route in app.routes if isinstance(route, Route | WebSocketRoute)]


def _leads_somewhere(template: str, routes: list[Route | WebSocketRoute]) -> bool:
    return any(route.path_regex.fullmatch(_example(template)) for route in routes)


def _example(template: str) -> str:
    """A path that matches the template."""
    return re.sub(r"{[^}]*}", "0", template)
