"""LangChain's ChatOpenAI: the report of answers in `response_metadata`; of a stream, the id of its line in
the access log."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI

URL, MODEL = sys.argv[1:]
PROMPT = "Count from one to a hundred, in words. " * 4


def model(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{URL}/v1",
        api_key="any",
        model=MODEL,
        max_tokens=24,
        include_response_headers=True,
        extra_body={"kv_cache": {"budget": 32, "buffer": 16}},
        **options,
    )


answer = model().invoke(PROMPT).response_metadata
first, *_ = model(stream_usage=True).stream(PROMPT)
response = model(use_responses_api=True).invoke(PROMPT).response_metadata
print(
    json.dumps(
        {
            "answer": answer["token_usage"]["completion_tokens_details"]["kv_cache"],
            "headers": answer["headers"],
            "headers of a stream": first.response_metadata["headers"],
            "headers of a response": response["headers"],
        }
    )
)
