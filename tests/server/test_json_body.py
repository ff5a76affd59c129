"""Bodies that are JSON, those that cannot be served, and those that are left to vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rkv_vllm.server.json_body import MOST_LEVELS, UnfitBody, json_object


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """An object with `levels` levels, itself one of them."""
    return b'{"a":' + opening * (levels - 1) + b"1" + closing * (levels - 1) + b"}"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"prompt": "\U0001f600 \u00e9 \ud7ff\ue000"},
        {"prompt": [[1, 2]] * 1000, "messages": [{"role": "user"}] * 1000},
        {"prompt": "[{" * 1000},
        {"prompt": "\\ud800"},  # six characters that only look like half of a pair
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_object_is_read_as_it_was_written(value: Any, encoding: str, ascii_only: bool) -> None:
    """Proves it in each encoding that vLLM takes, with characters beyond the first plane, however escaped."""
    assert json_object(json.dumps(value, ensure_ascii=ascii_only).encode(encoding)) == value


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[1]", b'"a"', b"5", b"{} {}", b'{"n":' + b"9" * 5000 + b"}"]
)
def test_what_is_no_object_is_left_to_vllm(body: bytes) -> None:
    """Proves that nothing is refused for being no JSON, or JSON of another kind."""
    assert json_object(body) is None


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
def test_the_depth_is_bounded(opening: bytes, closing: bytes) -> None:
    """Proves that the bound is exact, and holds far beyond what a parser can follow, closed or not."""
    step = len(opening.strip(b'"a:'))
    assert json_object(nested(MOST_LEVELS // step, opening, closing))
    for levels in (MOST_LEVELS + 1, 1000, 9000, 100_000):
        with pytest.raises(UnfitBody, match="nested"):
            json_object(nested(levels, opening, closing))
    with pytest.raises(UnfitBody, match="nested"):
        json_object(opening * 100_000)


@pytest.mark.parametrize("value", [[], "json", 5, False])
def test_structured_outputs_are_an_object(value: Any) -> None:
    """Proves that what vLLM cannot read there is refused by name, and an object or nothing is not."""
    with pytest.raises(UnfitBody, match="structured_outputs takes an object, not"):
        json_object(json.dumps({"structured_outputs": value}).encode())
    for right in ({"regex": "a"}, None):
        assert json_object(json.dumps({"structured_outputs": right}).encode())


HALVES = [rb"\ud800", rb"\uDFFF", rb"\ud800\ud800", rb"\udc00\ud800", b"\xed\xa0\x80", b"\xed\xbf\xbf"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    "body", [b'{"%s":1}', b'{"a":"%s"}', b'{"a":[[{"b":"x%sy"}]]}', b'["%s"]', b'"%s"', b'[{"a":{"%s":1}}]']
)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(body: bytes, half: bytes) -> None:
    """Proves it in names and values, escaped and not, and in other encodings."""
    text = body % half
    for encoded in (text, text.decode(errors="surrogatepass").encode("utf-16-le", "surrogatepass")):
        with pytest.raises(UnfitBody, match="surrogate"):
            json_object(encoded)
