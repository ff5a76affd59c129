"""Requests that no client sends by mistake: bodies and paths that have to be refused, never to fail."""

from __future__ import annotations

#: Routes that take a body; those without `kv_cache` last.
ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
)

_LONG = b"9" * 4300  # as many digits as Python reads
_REQUEST = (
    b'{"model":"smollm2","max_tokens":1,"prompt":["a","b"],"input":"a",'
    b'"messages":[{"role":"user","content":"a"}],%s}'
)

#: JSON that cannot be served, on whatever route.
UNFIT: dict[str, bytes] = {
    "lists without end": b"[" * 9000,
    "lists": b"[" * 9000 + b"]" * 9000,
    "objects without end": b'{"a":' * 9000,
    "as deep as a parser just follows": _REQUEST % (b'"a":' + b"[" * 950 + b"]" * 950),
    "deep, in kv_cache": _REQUEST % (b'"kv_cache":{"budget":' + b"[" * 500 + b"]" * 500 + b"}"),
    "deep, in vllm_xargs": _REQUEST % (b'"vllm_xargs":{"rkv_budget":' + b"[" * 500 + b"]" * 500 + b"}"),
    **{
        f"half a pair in {member.decode()}": _REQUEST % member
        for member in (
            rb'"kv_cache":{"\ud800":1}',
            rb'"kv_cache":{"policy":"\ud800"}',
            rb'"kv_cache":"\udfff"',
            rb'"vllm_xargs":{"rkv_\ud800":1}',
            rb'"vllm_xargs":{"\ud800":1}',
            rb'"\ud800":1',
            rb'"model":"\ud800"',
            rb'"messages":"\ud800"',
            rb'"messages":[{"role":"user","content":"\ud800"}]',
            rb'"stop":"\ud800"',
            rb'"bad_words":["a\ud800"]',
            rb'"n":"\ud800"',
        )
    },
    "structured outputs in a list": _REQUEST % b'"structured_outputs":[]',
    "structured outputs in a text": _REQUEST % (b'"structured_outputs":"%s"' % (b"s" * 15_000)),
    "half a pair, raw": _REQUEST % b'"user":"\xed\xa0\x80"',
    "half a pair, in UTF-16": (_REQUEST % rb'"user":"\ud800"').decode().encode("utf-16"),
    "half a pair and nothing else": rb'"\ud800"',
}

#: JSON that asks for what is not allowed, by names and values that are long, or not for a line of text.
REFUSED: dict[str, bytes] = {
    member.decode()[:40]: _REQUEST % member
    for member in (
        b'"kv_cache":{"%s":1}' % (b"x" * 15_000),
        b'"kv_cache":{"policy":"%s"}' % (b"p" * 15_000),
        b'"kv_cache":{"budget":%s}' % _LONG,
        b'"kv_cache":{"budget":1e400}',
        b'"kv_cache":{"budget":NaN}',
        b'"kv_cache":["%s"]' % (b"y" * 15_000),
        rb'"kv_cache":{"\n\u0000\u001b[31m\u2028":1}',
        b'"vllm_xargs":{"rkv_policy":"%s"}' % (b"p" * 15_000),
        b'"vllm_xargs":{"rkv_%s":1}' % (b"x" * 15_000),
        rb'"vllm_xargs":{"rkv_\r\n":1}',
        b'"vllm_xargs":{%s}' % b",".join(b'"rkv_%d":1' % number for number in range(1000)),
        b'"n":%s' % _LONG,
        b'"n":"%s"' % _LONG,
        b'"n":%s,"max_tokens":-%s' % (_LONG, _LONG),
        b'"max_tokens":%s' % _LONG,
        b'"max_tokens":"%s"' % _LONG,
        b'"max_output_tokens":1e15',
        b'"prompt_embeds":["a","b","c","d"]',
    )
}

#: Paths, as they go over the wire, that lead nowhere.
PATHS = (
    *("/v1/completions%0a", "/v1/completions%0A", "/v1/completions%0d%0a", "/v1/completions%00", "/%0a"),
    *("/v1/responses/resp_a%0a", "/v1/responses/resp_a%0a/cancel", "/v1/responses/resp_a/cancel%0a"),
    *("/health%0a", "/ready%0a", "/metrics%0a", "/v1/kv_cache%0a", "/v1/models%0a", "/openapi.json%0a"),
    *("/v1/completions%C2%85", "/v1/completions%7f", "/v1/completions%E2%80%A8", "/%ED%A0%80", "/%ff"),
    "/v1/completions/" + "%0a" * 5000,
)
