"""The middleware that vLLM's OpenAI application is given: budgets in, reports out, and `GET /v1/kv_cache`."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rkv_vllm.server import engine_client
from rkv_vllm.server.answer_headers import with_report_headers
from rkv_vllm.server.answer_report import ReportingSend
from rkv_vllm.server.asgi import ClientGone, is_request, read_body, replay, request_state, route_path
from rkv_vllm.server.auth import presented_key
from rkv_vllm.server.caller_rules import CallerRules, KvSettings
from rkv_vllm.server.engine_client import RequestContext
from rkv_vllm.server.errors import error_response, no_such_route
from rkv_vllm.server.json_body import UnfitBody, json_object
from rkv_vllm.server.near_misses import near_miss
from rkv_vllm.server.openapi import with_kv_cache
from rkv_vllm.server.protocol import FIELD
from rkv_vllm.server.request import FULL, XARGS, KvCacheError, read_kv_cache, read_xargs
from rkv_vllm.server.rules_by_api_key import RulesByApiKey
from rkv_vllm.server.summary import Summary
from rkv_vllm.settings.config import OFF
from rkv_vllm.settings.error_text import shown_name
from rkv_vllm.settings.requested import XARGS_PREFIX, RequestedSettings

#: Routes whose bodies take a `kv_cache` object, and whose answers have one.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
#: Member of a body by which vLLM searches beams.
BEAM_SEARCH = "use_beam_search"
_BOOLEAN = TypeAdapter(bool)
#: Route that tells a client what it may ask for, and what the server does.
BOUNDS_PATH = "/v1/kv_cache"


class KvCacheMiddleware:
    """ASGI middleware for an application whose `state.engine_client` is vLLM's engine client.

    It reads `KvSettings` from the environment unless it is given rules.
    """

    def __init__(self, app: ASGIApp, rules: RulesByApiKey | None = None) -> None:
        self.app = app
        self.rules = rules or RulesByApiKey.load(KvSettings())
        self._prepared: object = None
        self._summary = Summary()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            async with self._summary.sampling():  # while the application lives
                await self.app(scope, receive, send)
            return
        self._prepare(scope["app"])
        rules = self.rules.of(presented_key(Headers(scope=scope)))
        path = route_path(scope)
        if path is None:
            await no_such_route()(scope, receive, send)
        elif scope["type"] == "http" and path == BOUNDS_PATH:
            await self._bounds(rules, scope)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and path in PATHS:
            await self._generate(rules, scope, receive, send)
        else:
            await self._run(RequestContext(rules), scope, receive, send)

    def _bounds(self, rules: CallerRules, scope: Scope) -> JSONResponse:
        if scope["method"] not in ("GET", "HEAD"):
            said = "Method Not Allowed"
            error = {"message": said, "type": said, "param": None, "code": 405}
            return JSONResponse({"error": error}, status_code=405, headers={"allow": "GET, HEAD"})
        told = rules.bounds().model_copy(update={"summary": self._summary.now()})
        return JSONResponse(told.model_dump())

    async def _generate(self, rules: CallerRules, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive)
            context = RequestContext(rules, settings_of(rules, json_object(body)))
        except ClientGone:
            return  # nobody is left to answer
        except UnfitBody as error:
            await error_response(400, str(error))(scope, receive, send)
            return
        except Refused as error:
            await error_response(400, str(error), param=error.param)(scope, receive, send)
            return
        await self._run(context, scope, replay(body, receive), ReportingSend(send, context))

    async def _run(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        request_state(scope)["kv_cache"] = context
        with engine_client.request_context(context):
            await self.app(scope, receive, with_report_headers(send, context))

    def _prepare(self, app: Any) -> None:
        """Wrap what vLLM has made by the time of the first request."""
        client = app.state.engine_client
        if client is not None and client is not self._prepared:
            engine_client.wrap(client)
            app.openapi = with_kv_cache(app.openapi, PATHS, BOUNDS_PATH)
            self._prepared = client


class Refused(Exception):
    """A request whose `kv_cache` is wrong or not allowed; `param` is the path of the member in the body."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param} {message}")
        self.param = param


def settings_of(rules: CallerRules, body: dict[str, Any] | None) -> RequestedSettings | None:
    """What the engine is told about a request with this body; None where vLLM will refuse the body.

    Raises: Refused.
    """
    if body is None:
        return None
    if (missed := near_miss(body)) is not None:
        name, right = missed
        raise Refused(shown_name(name), f"is not read: write {right}")
    asked, xargs = body.get(FIELD), body.get(XARGS)
    flat = isinstance(xargs, dict) and any(key.startswith(XARGS_PREFIX) for key in xargs)
    if flat and asked is not None:
        raise Refused(FIELD, f"and the {XARGS_PREFIX} keys of {XARGS} exclude each other")
    try:
        settings = rules.resolve(read_xargs(xargs) if flat else read_kv_cache(asked))
    except KvCacheError as error:
        raise Refused(error.param(xargs=flat), str(error)) from None
    if settings.rkv_budget != OFF and _searches_beams(body):
        full = f'{{"{FIELD}": {{"budget": "{FULL}"}}}}'
        raise Refused(BEAM_SEARCH, f"needs {full}: its steps are requests of their own, too short to compact")
    return settings


def _searches_beams(body: dict[str, Any]) -> bool:
    """As vLLM's models read it, which take "true" and 1 too; what is no boolean is vLLM's to refuse."""
    try:
        return _BOOLEAN.validate_python(body.get(BEAM_SEARCH, False))
    except ValidationError:
        return False
