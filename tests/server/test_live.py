"""A running server and OpenAI's own client: budgets in, reports out, and what is not allowed is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from live_server import MODEL, PAGE_SIZE, StartServer
from schemathesis import GenerationMode
from typer.testing import CliRunner

from rkv_vllm.cli import app
from rkv_vllm.server.middleware import PATHS

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]

BUDGET, BUFFER, TOKENS = 32, 16, 24
KV_CACHE = {"budget": BUDGET, "buffer": BUFFER, "policy": "snapkv"}
TEXT = "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve. " * 4
MESSAGES: Any = [{"role": "user", "content": TEXT}]
FREE_KEY, STRICT_KEY = "key-of-a-caller-without-bounds", "key-of-a-caller-who-must-choose"


@pytest.fixture(scope="module")
def url(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    def digest(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()

    keys: Path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(
        f"{digest(FREE_KEY)}: {{budget: full, budget_max: null}}\n"
        f"{digest(STRICT_KEY)}: {{require_budget: true}}\n"
    )
    policy = "--kv-budget=64 --kv-budget-min=32 --kv-budget-max=256 --kv-buffer=32"
    policy += " --kv-policy=rkv --kv-policies=rkv,snapkv"
    # Routes that are closed unless asked for, and whose generations have to keep within the policy too.
    routes = "--open-routes=/v1/chat/completions/batch,/invocations,/inference/v1/generate"
    with start_server(*policy.split(), routes, f"--kv-key-policies={keys}", "--enable-scale-out") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


def chat(client: openai.OpenAI, kv_cache: Any = KV_CACHE, **more: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=TOKENS,
        extra_body={"kv_cache": kv_cache, "ignore_eos": True},
        **more,
    )


def check_compacted(report: dict[str, Any], sequences: int = 1) -> None:
    """The settings asked for were in force, tokens left, and fewer pages were held than without."""
    assert {key: report[key] for key in KV_CACHE} == KV_CACHE
    assert report["compactions"] >= sequences
    assert report["evicted_tokens"] > BUDGET
    assert 0 < report["peak_pages"] <= report["pages_without_compaction"]
    assert report.get("sequences", 1) == sequences
    assert "reason" not in report


def test_chat(client: openai.OpenAI) -> None:
    """Proves that a chat completion is compacted as it asked, and that its usage still counts all tokens."""
    answer = chat(client)
    check_compacted(answer.kv_cache)
    assert answer.usage.completion_tokens == TOKENS
    assert answer.usage.completion_tokens_details.kv_cache == answer.kv_cache
    evicted, total = answer.kv_cache["evicted_tokens"], answer.usage.total_tokens
    assert BUDGET <= total - evicted <= BUDGET + BUFFER + 1


def test_streamed_chat(client: openai.OpenAI) -> None:
    """Proves that the usage chunk of a stream has the report, and no other chunk."""
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == TOKENS
    assert last.usage.completion_tokens_details.kv_cache == last.kv_cache
    check_compacted(last.kv_cache)
    assert not any("kv_cache" in chunk.model_extra for chunk in chunks)


def test_a_protected_prompt_and_a_share(client: openai.OpenAI) -> None:
    """Proves that a prompt is counted and a share computed for each request, within the server's bounds."""
    request: Any = {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 100}

    def report(kv_cache: dict[str, Any], **more: Any) -> tuple[Any, Any]:
        extra = {"kv_cache": {"buffer": BUFFER, **kv_cache}, "ignore_eos": True}
        answer: Any = client.completions.create(**request, extra_body=extra, **more)
        return answer.kv_cache, answer.usage

    found, usage = report({"budget": "50%", "protect": "prompt"})
    assert found["protect"] == usage.prompt_tokens > 0
    assert found["budget"] == -(-usage.total_tokens // 2)
    assert found["compactions"] > 0
    smallest, _ = report({"budget": "1%"})
    assert smallest["budget"] == 32 and "protect" not in smallest


@pytest.mark.parametrize("stream", [False, True])
def test_a_protected_prompt_that_is_too_long_is_refused(client: openai.OpenAI, stream: bool) -> None:
    """Proves that nothing starts, streamed or not, and that the error names the member and the way out."""
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, {"budget": 64, "protect": "prompt"}, stream=stream)
    assert refused.value.param == "kv_cache.protect"
    assert "do not fit into a budget of 64: it takes at least" in refused.value.message


def test_several_choices(client: openai.OpenAI) -> None:
    """Proves that the report of a whole answer with n = 2 is the sum over both, and so is a stream's."""
    one = chat(client, temperature=0).kv_cache
    two = chat(client, n=2).kv_cache
    check_compacted(two, sequences=2)
    *_, last = chat(client, n=2, stream=True, stream_options={"include_usage": True})
    for key in ("compactions", "evicted_tokens", "pages_without_compaction"):
        assert two[key] == last.kv_cache[key] == 2 * one[key], "all have the same lengths"


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    """Proves that the report of two prompts, one of them too short to be compacted, is the sum over both."""
    answer: Any = client.completions.create(
        model=MODEL,
        prompt=[TEXT, "One,"],
        max_tokens=TOKENS,
        extra_body={"kv_cache": KV_CACHE, "ignore_eos": True},
    )
    report = answer.kv_cache
    assert report["sequences"] == 2
    assert report["compactions"] > 0
    short = (answer.usage.total_tokens, report["pages_without_compaction"])
    assert short[1] * PAGE_SIZE < short[0] + 2 * PAGE_SIZE


def test_responses(client: openai.OpenAI) -> None:
    """Proves that a response has the report, whole and in the event that completes its stream."""
    request: Any = {"model": MODEL, "input": TEXT, "max_output_tokens": TOKENS}
    extra = {"kv_cache": KV_CACHE, "ignore_eos": True}
    whole: Any = client.responses.create(**request, extra_body=extra)
    check_compacted(whole.kv_cache)
    assert whole.usage.output_tokens_details.kv_cache == whole.kv_cache
    *events, last = client.responses.create(**request, stream=True, extra_body=extra)
    assert last.type == "response.completed"
    assert last.response.kv_cache == whole.kv_cache
    assert not any("kv_cache" in str(event) for event in events)


def test_messages(url: str) -> None:
    """Proves that Anthropic's client gets the report: whole, at a stream's end, and in headers."""
    request: Any = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": TOKENS,
        "extra_body": {"kv_cache": KV_CACHE},
    }
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=120) as client:
        raw = client.messages.with_raw_response.create(**request)
        whole: Any = raw.parse()
        check_compacted(whole.kv_cache)
        assert int(raw.headers["x-rkv-compactions"]) == whole.kv_cache["compactions"]
        with client.messages.stream(**request) as stream:
            reports = [event.kv_cache for event in stream if event.type == "message_delta"]
        check_compacted(*reports)
        budget = {**request, "extra_body": {"kv_cache": {"budget": 3}}}
        for wrong, param in (
            (budget, "kv_cache.budget"),
            ({**request, "extra_body": {"kv_budget": 64}}, "kv_budget"),
        ):
            with pytest.raises(anthropic.BadRequestError) as refused:
                client.messages.create(**wrong)
            body: Any = refused.value.body
            assert (body["type"], body["error"]["param"]) == ("error", param)


def test_async_client_with_mixed_budgets(url: str) -> None:
    """Proves that requests in one batch keep their own budgets: small, large, and the server's default."""

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            chats = (
                client.chat.completions.create(
                    model=MODEL,
                    messages=MESSAGES,
                    max_tokens=TOKENS,
                    extra_body={"ignore_eos": True, **extra},
                )
                for extra in ({"kv_cache": {"budget": 33}}, {"kv_cache": {"budget": 256}}, {})
            )
            return list(await asyncio.gather(*chats))

    small, large, default = (answer.kv_cache for answer in asyncio.run(ask()))
    assert [small["budget"], large["budget"], default["budget"]] == [33, 256, 64]
    assert small["compactions"] >= 1 and default["compactions"] >= 1
    assert large["compactions"] == 0
    assert large["reason"] == "shorter than budget + buffer"


def test_an_answer_that_a_stop_string_ends_has_a_report(client: openai.OpenAI) -> None:
    """Proves that the report is there also where the API server, not the engine, ends the request."""
    text = chat(client, temperature=0).choices[0].message.content
    answer = chat(client, temperature=0, stop=[text[10:20]])
    assert answer.choices[0].finish_reason == "stop"
    check_compacted(answer.kv_cache)


@pytest.mark.parametrize(
    ("kv_cache", "param"),
    [
        ("512", "kv_cache"),
        ({"budgets": 64}, "kv_cache.budgets"),
        ({"budget": "64"}, "kv_cache.budget"),
        ({"budget": True}, "kv_cache.budget"),
        ({"budget": 8}, "kv_cache.budget"),
        ({"budget": 31}, "kv_cache.budget"),
        ({"budget": 257}, "kv_cache.budget"),
        ({"budget": "full"}, "kv_cache.budget"),
        ({"budget": 64, "buffer": 33}, "kv_cache.buffer"),
        ({"budget": 64, "policy": "random"}, "kv_cache.policy"),
    ],
)
def test_what_is_not_allowed_is_refused(client: openai.OpenAI, kv_cache: Any, param: str) -> None:
    """Proves that the client's own exception names the member that is wrong or out of bounds."""
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, kv_cache)
    assert refused.value.param == param
    assert refused.value.type == "BadRequestError"
    assert param in refused.value.message


def test_raw_envelope(url: str) -> None:
    """Proves that a refusal has exactly the members that vLLM's own have."""
    body = {"model": MODEL, "prompt": "One,", "max_tokens": 1}
    ours = httpx.post(f"{url}/v1/completions", json={**body, "kv_cache": {"budget": 9000}})
    theirs = httpx.post(f"{url}/v1/completions", json={**body, "max_tokens": -1})
    assert ours.status_code == theirs.status_code == 400
    assert ours.json() == {
        "error": {
            "message": "kv_cache.budget is 9000, which is not allowed here: 32 to 256 tokens",
            "type": "BadRequestError",
            "param": "kv_cache.budget",
            "code": 400,
        }
    }
    assert theirs.json()["error"].keys() == ours.json()["error"].keys()
    assert theirs.json()["error"]["type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "One,", "max_tokens": 1}),
        ("/v1/responses", {"input": "One,", "max_output_tokens": 1}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
        ("/v1/chat/completions/batch", {"messages": [MESSAGES], "max_tokens": 1}),
        ("/invocations", {"prompt": "One,", "max_tokens": 1}),
    ],
)
def test_no_route_leads_around_the_bounds(url: str, path: str, body: dict[str, Any]) -> None:
    """Proves that the engine's own keys obey the same bounds, also on routes that know no `kv_cache`."""
    request = {"model": MODEL, **body}
    refused = httpx.post(f"{url}{path}", json={**request, "vllm_xargs": {"rkv_budget": 9000}}, timeout=60)
    assert refused.status_code == 400, refused.text
    assert "vllm_xargs.rkv_budget is 9000" in refused.text
    allowed = httpx.post(f"{url}{path}", json={**request, "vllm_xargs": {"rkv_budget": 40}}, timeout=60)
    assert allowed.status_code == 200, allowed.text
    assert allowed.headers["x-rkv-budget"] == "40"


def test_tokens_in_tokens_out_obeys_the_bounds(url: str) -> None:
    """Proves the same of the route whose settings are plain sampling parameters."""
    body = {"model": MODEL, "token_ids": [1, 2, 3]}
    for budget, status in ((9000, 400), (40, 200)):
        sampling = {"max_tokens": 1, "extra_args": {"rkv_budget": budget}}
        answer = httpx.post(f"{url}/inference/v1/generate", json={**body, "sampling_params": sampling})
        assert answer.status_code == status, answer.text
    assert answer.headers["x-rkv-budget"] == "40"


def test_beam_search(client: openai.OpenAI) -> None:
    """Proves that it is refused under the server's default budget, and that with the full cache it gives the
    beams asked for, and a report over the requests that it consists of."""
    search: Any = {"extra_body": {"use_beam_search": True}, "n": 2, "max_tokens": 6, "temperature": 0}
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=TEXT, **search)
    assert refused.value.param == "use_beam_search"
    free = client.with_options(api_key=FREE_KEY)
    answer: Any = free.completions.create(model=MODEL, prompt=TEXT, **search)
    assert len({choice.text for choice in answer.choices}) == 2
    report = answer.kv_cache
    assert (report["budget"], report["compactions"], report["reason"]) == ("full", 0, "full cache")
    assert report["sequences"] == 1 + 5 * 2, "one request in the first step, and one a beam in each other"


def test_keys_have_policies_of_their_own(url: str, client: openai.OpenAI) -> None:
    """Proves that the API key decides: one may keep the full cache, and does; one must name a budget."""
    free = chat(client.with_options(api_key=FREE_KEY), {}).kv_cache
    assert (free["budget"], free["compactions"], free["reason"]) == ("full", 0, "full cache")
    assert chat(client.with_options(api_key=FREE_KEY), {"budget": 900}).kv_cache["budget"] == 900
    strict = client.with_options(api_key=STRICT_KEY)
    with pytest.raises(openai.BadRequestError) as refused:
        chat(strict, None)
    assert refused.value.param == "kv_cache.budget"
    check_compacted(chat(strict).kv_cache)


def test_auto_says_where_it_switched(url: str) -> None:
    """Proves that an answer tells up to which length it had its full cache, that it can be had again by it,
    and that a server with a largest budget refuses auto."""
    auto = {"budget": "auto", "min_budget": BUDGET, "buffer": BUFFER}
    with openai.OpenAI(base_url=f"{url}/v1", api_key=FREE_KEY, max_retries=0, timeout=120) as free:
        kept = chat(free, auto)
        assert (kept.kv_cache["budget"], kept.kv_cache["min_budget"]) == ("auto", BUDGET)
        assert kept.kv_cache["reason"] == "memory was never short"
        length = kept.usage.prompt_tokens + 9
        xargs = {f"rkv_{name}": value for name, value in (auto | {"switch_at": length}).items()}
        told = free.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=TOKENS,
            extra_body={"vllm_xargs": xargs, "ignore_eos": True},
        )
        assert told.model_extra["kv_cache"]["full_cache_tokens"] == length
        assert told.model_extra["kv_cache"]["compactions"] >= 1
        with pytest.raises(openai.BadRequestError) as refused:
            chat(free.with_options(api_key="any"), auto)
        assert refused.value.param == "kv_cache.budget"


def test_bounds_of_the_caller(url: str) -> None:
    """Proves that a client can ask what it may ask for, and is told by its key; that the server counts what
    it does for all of them, it tells each."""

    def bounds(key: str) -> Any:
        return httpx.get(f"{url}/v1/kv_cache", headers={"authorization": f"Bearer {key}"}).json()

    told = bounds("any")
    assert told.pop("summary")["model"] == MODEL
    assert told == {
        "object": "kv_cache.bounds",
        "budget": {
            "default": 64,
            "required": False,
            "min": 32,
            "max": 256,
            "full": False,
            "auto": False,
            "min_budget": 1024,
        },
        "buffer": {"default": 32, "min": 8, "max": 32},
        "policy": {"default": "rkv", "allowed": ["rkv", "snapkv"]},
        "protect": {"default": 0},
    }
    assert bounds(FREE_KEY)["budget"] == {
        "default": "full",
        "required": False,
        "min": 32,
        "max": None,
        "full": True,
        "auto": True,
        "min_budget": 1024,
    }
    assert bounds(STRICT_KEY)["budget"]["required"] is True
    assert httpx.post(f"{url}/v1/kv_cache").status_code == 405


def test_openapi_documents_the_additions(url: str) -> None:
    """Proves that the published schema has the object in the requests and answers of all four routes."""
    schema = httpx.get(f"{url}/openapi.json", timeout=60).json()
    schemas = schema["components"]["schemas"]
    for path in PATHS:
        operation = schema["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schemas[body]["properties"]["kv_cache"]["anyOf"][0] == {
            "$ref": "#/components/schemas/KvCacheRequest"
        }
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert answer["properties"]["kv_cache"] == {"$ref": "#/components/schemas/KvCacheReport"}
    assert schemas["KvCacheRequest"]["additionalProperties"] is False
    assert all("description" in member for member in schemas["KvCacheRequest"]["properties"].values())
    assert "/v1/kv_cache" in schema["paths"]


def published(url: str) -> Any:
    """The document of the running server, whose completions take nothing but a `kv_cache` object."""
    document = httpx.get(f"{url}/openapi.json", timeout=60).json()
    completions = document["paths"]["/v1/completions"]["post"]
    completions["requestBody"]["content"]["application/json"]["schema"] = {
        "$ref": "#/components/schemas/KvCacheRequest"
    }
    document["paths"] = {
        "/v1/completions": {"post": completions},
        "/v1/kv_cache": document["paths"]["/v1/kv_cache"],
    }
    return schemathesis.openapi.from_dict(document)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_server_keeps_to_its_published_schema(url: str, mode: GenerationMode) -> None:
    """Proves that what the schema allows is answered as it says, or refused for this server's bounds alone,
    and that what it forbids is refused by name."""
    operation = published(url)["/v1/completions"]["POST"]
    fields = {"model": MODEL, "prompt": "One,", "max_tokens": 1}

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
    def ask(case: schemathesis.Case) -> None:
        assume(not isinstance(case.body, bytes))  # no JSON: that is vLLM's to refuse
        answer = httpx.post(f"{url}/v1/completions", json={**fields, "kv_cache": case.body}, timeout=60)
        if answer.status_code == 200:
            assert mode is GenerationMode.POSITIVE, case.body
            operation.validate_response(answer)
            assert "kv_cache" in answer.json()
        else:
            assert answer.status_code == 400
            assert answer.json()["error"]["param"].partition(".")[0] == "kv_cache"

    ask()


def test_the_bounds_are_as_published(url: str) -> None:
    """Proves that `GET /v1/kv_cache` answers as its schema says."""
    published(url)["/v1/kv_cache"]["GET"].validate_response(httpx.get(f"{url}/v1/kv_cache"))


def test_evaluation(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that `rkv-vllm eval` measures a running server, by text and by token ids."""
    monkeypatch.setenv("OPENAI_API_KEY", FREE_KEY)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": TEXT, "answer": "thirteen"}) + "\n")
    options = ("--kv-budget", f"{BUDGET}", "--kv-buffer", f"{BUFFER}", "--max-tokens", f"{TOKENS}", "--json")
    for task in (f"jsonl:{questions}", "derivation"):
        words = ["eval", "--base-url", url, "--task", task, "--problems", "1", *options]
        out = tmp_path / task[:5]
        result = CliRunner().invoke(app, [*words, "--kv-policy", "rkv,snapkv", "--out", str(out)])
        assert result.exit_code == 0, result.output
        full, *budgeted = json.loads(result.stdout)["rows"]
        assert (full["setting"], full["evicted_tokens"]) == ("full", 0)
        assert [row["policy"] for row in budgeted] == ["rkv", "snapkv"]
        assert all(row["evicted_tokens"] > BUDGET and row["share_of_kv"] <= 1 for row in budgeted)


def test_lm_eval(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that lm-eval's client carries a budget in its generation arguments, and that it is kept."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)  # the task's file is named from there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", FREE_KEY)

    def compactions() -> float:
        text = httpx.get(f"{url}/metrics").text
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("rkv_compactions_total{") and 'policy="snapkv"' in line and "executed" in line
        )

    def evaluate(kv_cache: dict[str, Any]) -> float:
        before = compactions()
        results = simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{url}/v1/completions",
                "tokenizer_backend": None,
                "eos_string": "<|im_end|>",
            },
            tasks=["rkv_sums"],
            task_manager=TaskManager(include_path=str(ROOT / "benchmarks" / "lm_eval")),
            gen_kwargs={"kv_cache": kv_cache},
            limit=2,
        )
        assert 0 <= results["results"]["rkv_sums"]["exact_match,last-number"] <= 1
        return compactions() - before

    assert evaluate(KV_CACHE) >= 2, "each prompt is longer than budget and buffer"
    assert evaluate({"budget": "full"}) == 0
