"""The additions to `/openapi.json`: the `kv_cache` object of requests and answers, and `GET /v1/kv_cache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from rkv_vllm.server.protocol import FIELD, KvCacheBounds, KvCacheReport
from rkv_vllm.server.request import KvCacheRequest


def with_kv_cache(
    openapi: Callable[[], dict[str, Any]], paths: Sequence[str], bounds_path: str
) -> Callable[[], dict[str, Any]]:
    """`openapi`, a FastAPI application's, whose document also says what this package adds.

    Args:
        openapi: makes the document and may return the same one again.
        paths: routes whose bodies and answers have the object.
        bounds_path: route that says what a caller may ask for.
    """

    def document() -> dict[str, Any]:
        schema = openapi()
        if bounds_path not in schema["paths"]:
            _extend(schema, paths, bounds_path)
        return schema

    return document


def _extend(schema: dict[str, Any], paths: Sequence[str], bounds_path: str) -> None:
    references, models = models_json_schema(
        [(KvCacheRequest, "validation"), (KvCacheReport, "serialization"), (KvCacheBounds, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    request, report, bounds = references.values()
    schemas = schema["components"]["schemas"]
    schemas.update(models["$defs"])
    for path in (path for path in paths if path in schema["paths"]):
        operation = schema["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        schemas[body["$ref"].rpartition("/")[2]]["properties"][FIELD] = {
            "anyOf": [request, {"type": "null"}],
            "description": "How much of its KV cache the request keeps; absent: the server's default.",
            "examples": [{"budget": 1024}],
        }
        answer = operation["responses"]["200"]["content"].setdefault("application/json", {})
        answer["schema"] = {
            "type": "object",
            "description": f"The API's object, with `{FIELD}` beside `usage`.",
            "properties": {FIELD: report},
            "additionalProperties": True,
        }
    schema["paths"][bounds_path] = {
        "get": {
            "summary": "What requests may ask for in `kv_cache`, and what the server does",
            "operationId": "kv_cache_bounds",
            "responses": {
                "200": {
                    "description": "Defaults and bounds for this API key, and sums over all requests",
                    "content": {"application/json": {"schema": bounds}},
                }
            },
        }
    }
