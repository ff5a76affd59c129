"""Names that ask for a KV cache setting and are not the ones that are read.

vLLM ignores members that it does not know. A request with such a name would be answered with the server's
default, and what was measured with it would be believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rkv_vllm.server.protocol import FIELD
from rkv_vllm.server.request import XARGS, KvCacheRequest, XargsRequest
from rkv_vllm.settings.requested import XARGS_PREFIX

#: The keyword of OpenAI's Python client whose members it puts at the top level of a body.
EXTRA_BODY = "extra_body"
#: Names without case and separators -> the member of `kv_cache` that they mean; "" for the object itself.
_MEANT = {"kvcache": ""} | {
    f"{prefix}{member.replace('_', '')}": member
    for member in XargsRequest.model_fields
    for prefix in ("kv", "rkv", "kvcache")
}


def near_miss(body: Mapping[str, Any]) -> tuple[str, str] | None:
    """The path of a member of a body that is meant for `kv_cache`, and what to write; None: there is none."""
    nested, xargs = body.get(EXTRA_BODY), body.get(XARGS)
    for name in body:
        if name != FIELD and (member := _meant(name)) is not None:
            return name, _as_written(member)
    for name in nested if isinstance(nested, dict) else ():
        if (member := _meant(name)) is not None:
            return f"{EXTRA_BODY}.{name}", f"{_as_written(member)} at the top level of the body"
    for name in xargs if isinstance(xargs, dict) else ():
        if not name.startswith(XARGS_PREFIX) and (member := _meant(name)) is not None:
            here = f"{XARGS}.{XARGS_PREFIX}{member}"
            return f"{XARGS}.{name}", here if member else f"{_as_written('')} at the top level of the body"
    return None


def _meant(name: str) -> str | None:
    return _MEANT.get(name.lower().replace("_", "").replace("-", "").replace(".", ""))


def _as_written(member: str) -> str:
    if member and member not in KvCacheRequest.model_fields:
        return f"{XARGS}.{XARGS_PREFIX}{member}"
    return f'{{"{FIELD}": {{"{member}": ...}}}}' if member else f'{{"{FIELD}": {{...}}}}'
