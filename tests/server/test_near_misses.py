"""Names that ask for a KV cache setting where none is read."""

from __future__ import annotations

from typing import Any

import pytest

from rkv_vllm.server.caller_rules import CallerRules
from rkv_vllm.server.middleware import Refused, settings_of

TOP = "at the top level of the body"


@pytest.mark.parametrize(
    ("body", "param", "right"),
    [
        ({"kv_budget": 64}, "kv_budget", '{"kv_cache": {"budget": ...}}'),
        ({"rkv_budget": 64}, "rkv_budget", '{"kv_cache": {"budget": ...}}'),
        ({"kvBuffer": 64}, "kvBuffer", '{"kv_cache": {"buffer": ...}}'),
        ({"kv_cache.policy": "rkv"}, "kv_cache.policy", '{"kv_cache": {"policy": ...}}'),
        ({"kv-policy": None}, "kv-policy", '{"kv_cache": {"policy": ...}}'),
        ({"kv_min_budget": 64}, "kv_min_budget", '{"kv_cache": {"min_budget": ...}}'),
        ({"rkv_switch_at": 64}, "rkv_switch_at", "vllm_xargs.rkv_switch_at"),
        ({"vllm_xargs": {"kv_switch_at": 64}}, "vllm_xargs.kv_switch_at", "vllm_xargs.rkv_switch_at"),
        ({"kvcache": {"budget": 64}}, "kvcache", '{"kv_cache": {...}}'),
        ({"KV_CACHE": 5, "kv_cache": {"budget": 64}}, "KV_CACHE", '{"kv_cache": {...}}'),
        ({"extra_body": {"kv_cache": {}}}, "extra_body.kv_cache", f'{{"kv_cache": {{...}}}} {TOP}'),
        (
            {"extra_body": {"kv_budget": 9}},
            "extra_body.kv_budget",
            f'{{"kv_cache": {{"budget": ...}}}} {TOP}',
        ),
        ({"vllm_xargs": {"kv_budget": 64}}, "vllm_xargs.kv_budget", "vllm_xargs.rkv_budget"),
        ({"vllm_xargs": {"kv_cache": {}}}, "vllm_xargs.kv_cache", f'{{"kv_cache": {{...}}}} {TOP}'),
    ],
)
def test_a_near_miss_is_refused_with_the_right_name(body: dict[str, Any], param: str, right: str) -> None:
    """Proves that a setting which would be ignored is refused, by its path and what to write instead."""
    with pytest.raises(Refused) as refused:
        settings_of(CallerRules(), {"model": "m", "prompt": "a", **body})
    assert refused.value.param == param
    assert str(refused.value) == f"{param} is not read: write {right}"


@pytest.mark.parametrize(
    "body",
    [
        {"kv_cache": {"budget": 64}},
        {"vllm_xargs": {"rkv_budget": 64}},
        {"vllm_xargs": {"another": "argument", "budget": 5}},
        {"extra_body": {"top_k": 5}},
        {"extra_body": "kv_cache", "vllm_xargs": ["kv_budget"]},
        {"budget": 5, "cache": {}, "kv_transfer_params": {}, "user": "kv_budget"},
    ],
)
def test_other_names_are_left_alone(body: dict[str, Any]) -> None:
    """Proves that right names, names of others and values pass."""
    settings_of(CallerRules(), {"model": "m", "prompt": "a", **body})


def test_a_near_miss_of_any_length_is_cut() -> None:
    """Proves that separators without end do not come back."""
    with pytest.raises(Refused) as refused:
        settings_of(CallerRules(), {"kv" + "_" * 10_000 + "budget": 64})
    assert len(str(refused.value)) < 200
