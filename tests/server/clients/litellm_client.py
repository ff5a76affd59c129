"""litellm: settings in `extra_body`, the report in answers and streams."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

URL, MODEL = sys.argv[1:]
KV_CACHE = {"budget": 32, "buffer": 16}
REQUEST: dict[str, Any] = {
    "model": f"openai/{MODEL}",
    "api_base": f"{URL}/v1",
    "api_key": "any",
    "messages": [{"role": "user", "content": "Count from one to a hundred, in words. " * 4}],
    "max_tokens": 24,
    "temperature": 0,
    "extra_body": {"kv_cache": KV_CACHE},
}

answer = litellm.completion(**REQUEST)
chunks = list(litellm.completion(**REQUEST, stream=True, stream_options={"include_usage": True}))
rebuilt: Any = litellm.stream_chunk_builder(chunks)
response = litellm.responses(
    model=REQUEST["model"],
    api_base=REQUEST["api_base"],
    api_key="any",
    input="Count from one to a hundred, in words. " * 4,
    max_output_tokens=24,
    extra_body={"kv_cache": KV_CACHE},
)
print(
    json.dumps(
        {
            "answer": answer.kv_cache,
            "headers": answer._response_headers,
            "additional headers": answer._hidden_params["additional_headers"],
            "last chunk": chunks[-1].usage.completion_tokens_details.kv_cache,
            "stream put together": rebuilt.usage.completion_tokens_details.kv_cache,
            "response": response.kv_cache,
        }
    )
)
