"""Budgets on their way from a request's body to the engine, with a small application in vLLM's place."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.testclient import TestClient
from vllm.exceptions import VLLMValidationError

from rkv_vllm.server.caller_rules import CallerRules
from rkv_vllm.server.middleware import PATHS, KvCacheMiddleware, Refused, settings_of
from rkv_vllm.server.request import KvCacheRequest
from rkv_vllm.server.rules_by_api_key import RulesByApiKey
from rkv_vllm.settings.policy_table import POLICY_NAMES

RULES = CallerRules(budget=512, budget_min=256, budget_max=1024)
DEFAULT = {"rkv_budget": 512, "rkv_buffer": 128, "rkv_policy": "invariant", "rkv_protect": 0}


class Body(BaseModel):
    prompt: str = ""
    max_tokens: int | None = None
    vllm_xargs: dict[str, Any] | None = None


class Engine:
    """Remembers what it was asked to generate with."""

    def __init__(self) -> None:
        self.extra_args: list[Any] = []
        self.model_config = SimpleNamespace(max_model_len=2048)

    async def generate(self, prompt: dict[str, Any], sampling_params: SimpleNamespace) -> Any:
        self.extra_args.append(sampling_params.extra_args)
        yield SimpleNamespace(finished=True, kv_transfer_params=None)


def application(engine: Engine, rules: CallerRules = RULES) -> TestClient:
    app = FastAPI()
    app.state.engine_client = engine

    async def generate(body: Body) -> Any:
        """Like vLLM's routes, from which the engine gets what is in `vllm_xargs`."""
        sampling_params = SimpleNamespace(extra_args=body.vllm_xargs, max_tokens=body.max_tokens)
        tokens = {"prompt_token_ids": list(body.prompt.encode())}
        async for _ in engine.generate(tokens, sampling_params=sampling_params):
            pass
        return {"prompt": body.prompt}

    async def echo(request: Request) -> Any:
        return {"length": len(await request.body())}

    for path in (*PATHS, "/invocations"):
        app.post(path)(generate)
    app.post("/echo")(echo)
    app.add_middleware(KvCacheMiddleware, rules=RulesByApiKey(rules, {}))
    return TestClient(app)


@pytest.mark.parametrize("path", PATHS)
def test_the_settings_of_the_body_reach_the_engine(path: str) -> None:
    """Proves that `kv_cache` and the flat keys mean the same on all routes that take it; others' keys
    survive."""
    engine = Engine()
    client = application(engine)
    bodies: list[dict[str, Any]] = [
        {"kv_cache": {"budget": 256, "policy": "snapkv"}, "vllm_xargs": {"theirs": 1}},
        {"vllm_xargs": {"rkv_budget": 256, "rkv_policy": "snapkv", "theirs": 1}},
        {},
        {"kv_cache": None},
    ]
    for body in bodies:
        assert client.post(path, json={"prompt": "a", **body}).json() == {"prompt": "a"}
    chosen = {**DEFAULT, "rkv_budget": 256, "rkv_policy": "snapkv", "theirs": 1}
    assert engine.extra_args == [chosen, chosen, DEFAULT, DEFAULT]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"kv_cache": {"budget": 255}}, "kv_cache.budget"),
        ({"kv_cache": {"budget": "full"}}, "kv_cache.budget"),
        ({"kv_cache": {"budge": 512}}, "kv_cache.budge"),
        ({"kv_cache": 512}, "kv_cache"),
        ({"vllm_xargs": {"rkv_budget": 0}}, "vllm_xargs.rkv_budget"),
        ({"vllm_xargs": {"rkv_budget": "512"}}, "vllm_xargs.rkv_budget"),
        ({"kv_cache": {"budget": 512}, "vllm_xargs": {"rkv_budget": 512}}, "kv_cache"),
    ],
)
def test_a_refused_request_starts_nothing(body: dict[str, Any], param: str) -> None:
    """Proves that the error is OpenAI's envelope with the member's path; the engine hears nothing."""
    engine = Engine()
    answer = application(engine).post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, 400, "BadRequestError")
    assert error["message"].startswith(param)
    assert engine.extra_args == []


def test_other_routes_obey_the_same_bounds() -> None:
    """Proves that a route whose body is not read gets the default, and cannot ask for more."""
    engine = Engine()
    client = application(engine)
    assert client.post("/invocations", json={}).status_code == 200
    assert client.post("/invocations", json={"vllm_xargs": {"rkv_budget": 1024}}).status_code == 200
    assert engine.extra_args == [DEFAULT, {**DEFAULT, "rkv_budget": 1024}]
    with pytest.raises(VLLMValidationError, match="rkv_budget is 1025") as refused:  # vLLM answers with 400
        client.post("/invocations", json={"vllm_xargs": {"rkv_budget": 1025}})
    assert refused.value.parameter == "vllm_xargs.rkv_budget"
    assert len(engine.extra_args) == 2


@pytest.mark.parametrize("value", [True, 1, "true"])
def test_beam_search_needs_the_full_cache(value: Any) -> None:
    """Proves that a search whose steps are too short to be compacted is refused, also under a default budget,
    and served where it keeps its full cache, as is a request that searches no beams."""
    engine = Engine()
    budgeted, free = application(engine), application(engine, CallerRules())
    search = {"use_beam_search": value}
    for client, body in ((budgeted, search), (free, {**search, "kv_cache": {"budget": 64}})):
        error = client.post("/v1/completions", json=body).json()["error"]
        assert (error["param"], error["code"]) == ("use_beam_search", 400)
        assert '{"kv_cache": {"budget": "full"}}' in error["message"]
    assert engine.extra_args == []
    for served in (search, {**search, "kv_cache": {"budget": "full"}}):
        assert free.post("/v1/completions", json=served).status_code == 200
    for no_search in ({"use_beam_search": False}, {"use_beam_search": "perhaps"}):
        assert budgeted.post("/v1/completions", json=no_search).status_code == 200


@pytest.mark.parametrize("member", ["budget", "buffer"])
def test_a_number_beyond_all_contexts_is_told_the_bound(member: str) -> None:
    """Proves that the message does not say what is true of the number that it refuses."""
    answer = application(Engine()).post("/v1/completions", json={"kv_cache": {member: 10**12}})
    assert f"to {2**31 - 1}" in answer.json()["error"]["message"]


def test_anthropics_clients_find_a_type_beside_the_error() -> None:
    """Proves that a refusal on their route has what they look for and what OpenAI's envelope has."""
    answer = application(Engine()).post("/v1/messages", json={"kv_cache": {"budget": 3}})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["param"] == "kv_cache.budget"
    assert answer.json()["error"]["message"].startswith("kv_cache.budget takes")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"a"', b"\xff"])
def test_what_is_no_json_object_is_left_to_vllm(content: bytes) -> None:
    """Proves that its own refusal is what the client sees."""
    headers = {"content-type": "application/json"}
    answer = application(Engine()).post("/v1/completions", content=content, headers=headers)
    assert answer.status_code in (400, 422)
    assert "detail" in answer.json(), "FastAPI's own"


UNFIT = [b"[" * 100_000, b'{"kv_cache":{"\\ud800":1}}', b'{"prompt":"\xed\xa0\x80"}']


@pytest.mark.parametrize("content", UNFIT, ids=["deep", "escaped", "raw"])
def test_json_that_cannot_be_served_is_refused(content: bytes) -> None:
    """Proves that nothing of it reaches the application, whose parser or answer would fail."""
    engine = Engine()
    answer = application(engine).post("/v1/completions", content=content)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError")
    assert engine.extra_args == []


@pytest.mark.parametrize(
    "path", ["/v1/completions%0a", "/v1/kv_cache%0A", "/echo%00", "/v1/completions%C2%85"]
)
def test_no_route_has_control_characters(path: str) -> None:
    """Proves that a path which the application's router takes for a route is not served past the rules."""
    engine = Engine()
    answer = application(engine).post(path, json={"kv_cache": {"budget": 9000}})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
    assert engine.extra_args == []


def test_a_body_in_parts_arrives_whole() -> None:
    """Proves that the application reads what the client sent, however it was cut."""
    engine = Engine()
    body = json.dumps({"prompt": "b" * 100_000, "kv_cache": {"budget": 300}}).encode()
    parts = (body[i : i + 1000] for i in range(0, len(body), 1000))
    headers = {"content-type": "application/json"}
    answer = application(engine).post("/v1/completions", content=parts, headers=headers)
    assert answer.json() == {"prompt": "b" * 100_000}
    assert engine.extra_args[0]["rkv_budget"] == 300


def test_the_route_of_its_own_says_what_is_allowed() -> None:
    """Proves that it answers GET alone."""
    client = application(Engine())
    assert client.get("/v1/kv_cache").json()["budget"] == {
        "default": 512,
        "required": False,
        "min": 256,
        "max": 1024,
        "full": False,
        "auto": False,
        "min_budget": 1024,
    }
    refused = client.post("/v1/kv_cache")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


def test_the_published_schema_says_what_is_added() -> None:
    """Proves that the additions are there after any request, once, and that references lead somewhere."""
    client = application(Engine())
    schema = client.get("/openapi.json").json()
    assert schema == client.get("/openapi.json").json()
    assert "/v1/kv_cache" in schema["paths"]
    assert "kv_cache" in schema["components"]["schemas"]["Body"]["properties"]
    text = json.dumps(schema)
    references = {part.partition('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert {"KvCacheRequest", "KvCacheReport", "KvCacheBounds"} <= references
    assert references <= schema["components"]["schemas"].keys()


#: With halves of surrogate pairs, which Hypothesis leaves out of its own accord.
TEXT = st.text(st.characters(exclude_categories=()), max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["full", "rkv"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
MEMBERS = st.fixed_dictionaries(
    {},
    optional={
        "budget": st.integers(0, 2000) | JSON,
        "buffer": st.integers(0, 200) | JSON,
        "policy": st.sampled_from(POLICY_NAMES) | JSON,
        "other": JSON,
    },
)


@settings(deadline=None)
@given(MEMBERS | JSON)
def test_any_value_is_resolved_within_the_bounds_or_refused_by_name(value: Any) -> None:
    """Proves that nothing a client can write leads to another error, or around a bound."""
    try:
        resolved = settings_of(RULES, {"kv_cache": value})
    except Refused as refused:
        assert refused.param.startswith("kv_cache")
        assert str(refused).isascii() and str(refused).isprintable()
        return
    assert resolved is not None and resolved.rkv_budget is not None and resolved.rkv_buffer is not None
    assert 256 <= resolved.rkv_budget <= 1024
    assert 8 <= resolved.rkv_buffer <= 128


@settings(deadline=None)
@given(MEMBERS | JSON)
def test_the_published_schema_accepts_what_the_server_accepts(value: Any) -> None:
    """Proves that without bounds exactly what follows the schema is served."""
    if isinstance(value, dict) and any(isinstance(member, float) for member in value.values()):
        return  # JSON Schema takes 512.0 for an integer
    published = jsonschema.Draft202012Validator(KvCacheRequest.model_json_schema())
    try:
        settings_of(CallerRules(), {"kv_cache": value})
    except Refused:
        assert not published.is_valid(value)
    else:
        assert value is None or published.is_valid(value)
