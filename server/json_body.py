"""The JSON of a request's body, read as vLLM reads it."""

from __future__ import annotations

import json
import re
from typing import Any

from rkv_vllm.settings.error_text import shown

#: Levels of objects and lists in a body; no schema needs as many. Each parser fails at a depth of its own.
MOST_LEVELS = 200
#: How half of a surrogate pair may be written, whole pairs among them.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


class UnfitBody(Exception):
    """JSON that cannot be served; the message is a sentence for the client."""


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in `body`; None for what vLLM will refuse because it is none.

    Raises: UnfitBody for JSON that is nested too deeply, or that has half of a surrogate pair in it: it
    parses, but it is no text, and whatever encodes it again, vLLM's engine and its errors too, fails. Also
    for `structured_outputs` that are no object, on which vLLM 0.32 answers 500.
    """
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        value = json.loads(text)
        deep = text.count("[") + text.count("{") > MOST_LEVELS and _levels(value) > MOST_LEVELS
    except ValueError:
        return None
    except RecursionError:
        deep = True
    if deep:
        raise UnfitBody(f"The body's JSON is nested deeper than {MOST_LEVELS} levels.")
    if _SURROGATE.search(text) and not _is_text(value):
        raise UnfitBody("The body's JSON has half of a surrogate pair in it, which is no character.")
    if not isinstance(value, dict):
        return None
    structured = value.get("structured_outputs")
    if structured is not None and not isinstance(structured, dict):
        raise UnfitBody(f"structured_outputs takes an object, not {shown(structured)}.")
    return value


def _levels(value: Any) -> int:
    levels, within = 0, [value]
    while within := [item for item in within if isinstance(item, dict | list)]:
        levels += 1
        within = [inner for item in within for inner in (item.values() if isinstance(item, dict) else item)]
    return levels


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
