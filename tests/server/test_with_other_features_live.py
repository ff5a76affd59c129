"""Features of vLLM that act on running requests, beside a budget, in one server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live_server import MODEL, PAGE_SIZE, StartServer

PAGES = 24
THINKING = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
BUDGET, BUFFER = 64, 32


@pytest.fixture(scope="module")
def url(start_server: StartServer) -> Iterator[str]:
    options = (
        *("--num-gpu-blocks-override", str(PAGES), "--max-model-len", "512"),
        "--enable-prompt-tokens-details",
        *("--scheduling-policy", "priority", "--kv-budget", str(BUDGET), "--kv-buffer", str(BUFFER)),
        f"--reasoning-config={json.dumps(THINKING)}",
    )
    with start_server(*options) as url:
        yield url


def ask(url: str, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_repetition_detection_ends_a_compacted_loop(url: str) -> None:
    """A request that loops after its compactions is ended long before max_tokens, with its reason."""
    rule = {"max_pattern_size": 64, "min_count": 4}
    looping = ask(url, "one two " * 60, max_tokens=300, ignore_eos=True, repetition_detection=rule)
    [choice] = looping["choices"]
    assert choice["finish_reason"] == "repetition"
    assert looping["usage"]["completion_tokens"] < 300
    assert looping["kv_cache"]["compactions"] > 0


def test_thinking_ends_at_its_budget_in_a_compacted_request(url: str) -> None:
    """A limit on the tokens of thinking counts tokens of the text, whatever has left the cache by then."""
    fields = {"max_tokens": 200, "ignore_eos": True}
    thinking = ask(url, "<think>one two three", thinking_token_budget=150, **fields)
    endless = ask(url, "<think>one two three", **fields)
    assert thinking["kv_cache"]["compactions"] == endless["kv_cache"]["compactions"] > 1
    before, end, _ = thinking["choices"][0]["text"].partition("</think>")
    assert end and endless["choices"][0]["text"].startswith(before)
    assert "</think>" not in endless["choices"][0]["text"]


def test_priorities_and_budgets_share_a_small_pool(url: str) -> None:
    """Urgent and other requests, some with full caches, in a pool that cannot hold them all at once: each
    gets all its tokens, the compacted ones with as many rounds as alone, and no page is held afterwards."""
    full = {"kv_cache": {"budget": "full"}}
    fields = [{"priority": number % 2 * 5, **(full if number % 3 == 0 else {})} for number in range(8)]
    alone = ask(url, "Story 1. Once upon a time", max_tokens=200, ignore_eos=True)
    with ThreadPoolExecutor(len(fields)) as clients:
        answers = list(
            clients.map(
                lambda of: ask(
                    url, f"Story {of[0]}. Once upon a time", max_tokens=200, ignore_eos=True, **of[1]
                ),
                enumerate(fields),
            )
        )
    for answer, wishes in zip(answers, fields, strict=True):
        assert answer["usage"]["completion_tokens"] == 200
        expected = 0 if "kv_cache" in wishes else alone["kv_cache"]["compactions"]
        assert answer["kv_cache"]["compactions"] == expected
    assert sum(answer["kv_cache"]["pages_without_compaction"] for answer in answers) > PAGES
    ask(url, "a", max_tokens=1)  # vLLM renews its gauges with a step
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    [held] = [line.split()[-1] for line in metrics if line.startswith("rkv_pages_held{")]
    assert float(held) == 0


@pytest.mark.parametrize("budget", [BUDGET, "full"])
def test_what_the_next_turn_finds_in_the_prefix_cache(url: str, budget: int | str) -> None:
    """After a compacted turn the tokens before its first compaction, after a turn with a full cache all whole
    pages but what was not computed: the last token, and the page that is to be computed."""
    prompt = list(range(1000, 1070)) if budget == "full" else list(range(2000, 2070))
    fields = {"kv_cache": {"budget": budget}, "ignore_eos": True, "return_token_ids": True}
    first = ask(url, prompt, max_tokens=200, **fields)
    written = first["choices"][0]["token_ids"]
    second = ask(url, prompt + written, max_tokens=1, **fields)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (BUDGET + BUFFER if budget == BUDGET else 269 // PAGE_SIZE * PAGE_SIZE)
