"""A server's bounds and defaults: where they come from, what they refuse, and whom they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rkv_vllm.server.caller_rules import CallerRules, KvSettings
from rkv_vllm.server.request import KvCacheError, KvCacheRequest, read_kv_cache, read_xargs
from rkv_vllm.server.rules_by_api_key import RulesByApiKey
from rkv_vllm.settings.config import WINDOW
from rkv_vllm.settings.error_text import explain
from rkv_vllm.settings.policy_table import POLICY_NAMES
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import XARGS_PREFIX, RequestedSettings

KEY = "the key of a caller"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
BOUNDED = CallerRules(budget=512, budget_min=256, budget_max=1024, policy="rkv", policies=("rkv", "snapkv"))


def resolved(rules: CallerRules, /, **asked: Any) -> tuple[int | None, int | None, str | None]:
    request = rules.resolve(KvCacheRequest(**asked))
    return request.rkv_budget, request.rkv_buffer, request.rkv_policy


def test_a_request_gets_what_it_asks_for_and_defaults_for_the_rest() -> None:
    """Proves that every setting reaches the engine explicitly, whether it was named or not."""
    assert resolved(BOUNDED) == (512, 128, "rkv")
    assert resolved(BOUNDED, budget=256) == (256, 128, "rkv")
    assert resolved(BOUNDED, budget=1024, buffer=64, policy="snapkv") == (1024, 64, "snapkv")
    assert resolved(CallerRules()) == (0, 128, "invariant")
    assert resolved(CallerRules(budget=512), budget="full") == (0, 128, "invariant")
    assert resolved(CallerRules(), budget=9) == (9, 128, "invariant")


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"budget": 255}, "budget"),
        ({"budget": 1025}, "budget"),
        ({"budget": "full"}, "budget"),
        ({"buffer": 129}, "buffer"),
        ({"policy": "keydiff"}, "policy"),
        ({"budget": "auto"}, "budget"),
        ({"min_budget": 256}, "min_budget"),
        ({"max_budget": 4096}, "max_budget"),
        ({"budget": 512, "min_budget": 256}, "min_budget"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(asked: dict[str, Any], field: str) -> None:
    """Proves that each bound holds, that of memory (budget + buffer) among them."""
    with pytest.raises(KvCacheError) as refused:
        BOUNDED.resolve(KvCacheRequest(**asked))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("rules", "share", "tokens"),
    [
        (CallerRules(), "25%", 200),
        (CallerRules(), "0.1%", WINDOW + 1),
        (BOUNDED, "25%", 256),
        (BOUNDED, "50%", 400),
        (CallerRules(budget=64, budget_max=128), "100%", 128),
        (CallerRules(budget="25%", budget_max=128), None, 128),
        (CallerRules(budget="25%"), None, 200),
    ],
)
def test_a_share_is_brought_within_the_bounds(rules: CallerRules, share: str | None, tokens: int) -> None:
    """Proves that bounds hold for shares, the default among them, though none is refused for its length."""
    settings = rules.resolve(KvCacheRequest(budget=share))
    assert rules.settle(settings, RequestSize(prompt=100, longest=800)).rkv_budget == tokens


def test_a_protected_prompt_is_counted_and_has_to_fit() -> None:
    """Proves what the engine is told of a prompt, and the refusal of one that leaves no room."""
    asked = BOUNDED.resolve(KvCacheRequest(budget=300, protect="prompt"))
    assert BOUNDED.settle(asked, RequestSize(prompt=291, longest=800)).rkv_protect == 291
    with pytest.raises(KvCacheError, match=r'cannot be "prompt": 292 protected .* at least 301') as no:
        BOUNDED.settle(asked, RequestSize(prompt=292, longest=800))
    assert no.value.field == "protect"
    full = CallerRules().resolve(KvCacheRequest(budget="full", protect="prompt"))
    assert CallerRules().settle(full, RequestSize(prompt=5000, longest=6000)).rkv_protect == 0
    assert CallerRules(budget=64, protect=12).resolve(KvCacheRequest()).rkv_protect == 12
    with pytest.raises(ValidationError, match="do not fit into a budget of 64"):
        CallerRules(budget=64, protect=60)


def test_auto_is_told_to_the_engine_with_its_bounds() -> None:
    """Proves whose word counts, that a default is brought within the bounds, and what is refused."""
    rules = CallerRules(budget="auto", min_budget=128, budget_min=64)
    told = rules.resolve(KvCacheRequest()).model_dump(exclude_none=True)
    assert told["rkv_budget"] == "auto" and told["rkv_min_budget"] == 128
    assert "rkv_max_budget" not in told and "rkv_switch_at" not in told
    own = rules.resolve(KvCacheRequest(budget="auto", min_budget=64, max_budget=512))
    assert (own.rkv_min_budget, own.rkv_max_budget) == (64, 512)
    assert rules.settle(own, RequestSize(prompt=500, longest=900)) == own
    flat = rules.resolve(read_xargs({"rkv_budget": "auto", "rkv_switch_at": 9216}))
    assert (flat.rkv_switch_at, flat.rkv_min_budget) == (9216, 128)
    assert CallerRules(budget_min=2048).resolve(KvCacheRequest(budget="auto")).rkv_min_budget == 2048
    with pytest.raises(KvCacheError, match="the least here is 64") as low:
        rules.resolve(KvCacheRequest(min_budget=63))
    with pytest.raises(KvCacheError, match="128 is not above min_budget, 128") as high:
        rules.resolve(KvCacheRequest(max_budget=128))
    with pytest.raises(KvCacheError, match="do not fit into a budget of 64") as protected:
        rules.settle(rules.resolve(KvCacheRequest(min_budget=64, protect=60)), RequestSize(70, 900))
    with pytest.raises(KvCacheError, match="is unknown") as unknown:
        read_kv_cache({"budget": "auto", "switch_at": 9216})
    assert [no.value.field for no in (low, high, protected, unknown)] == [
        "min_budget",
        "max_budget",
        "protect",
        "switch_at",
    ]


def test_a_budget_may_be_required() -> None:
    """Proves that silence is refused then, and that `full` is an answer."""
    rules = CallerRules(require_budget=True)
    with pytest.raises(KvCacheError, match="required"):
        rules.resolve(KvCacheRequest(buffer=64))
    assert resolved(rules, budget="full") == (0, 128, "invariant")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"budget": 8}, "budget"),
        ({"budget": "half"}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget_min": 1024, "budget_max": 512}, "budget_min"),
        ({"budget": 128, "budget_min": 256}, "budget"),
        ({"budget": 1024, "budget_max": 512}, "budget"),
        ({"budget_max": 512}, "budget"),  # the default would be the full cache
        ({"policy": "rkv", "policies": "snapkv"}, "policy"),
        ({"policies": ""}, "policies"),
        ({"policies": "rkv,unknown"}, "policies"),
        ({"buffer": 7}, "buffer"),
        ({"budgets": 512}, "budgets"),
        ({"budget": "auto", "budget_max": 4096}, "budget"),
        ({"min_budget": 8}, "min_budget"),
        ({"min_budget": 512, "max_budget": 512}, "max_budget"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    """Proves that a server does not start with a default that it would refuse, and says which it is."""
    with pytest.raises(ValidationError) as refused:
        CallerRules(**settings)
    assert explain(refused.value, depth=1).startswith(f"{named}: ")


def test_settings_come_from_the_environment_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that text is read as what it means, and that a flag goes before its variable."""
    for name, value in {
        "BUDGET": "512",
        "BUDGET_MAX": "1024",
        "POLICY": "rkv",
        "POLICIES": "rkv, snapkv",
    }.items():
        monkeypatch.setenv(f"RKV_KV_{name}", value)
    monkeypatch.setenv("RKV_KV_MIX_LAMBDA", "0.2")
    settings = KvSettings(budget="256")
    assert (settings.budget, settings.budget_max, settings.policies) == (256, 1024, ("rkv", "snapkv"))
    assert settings.engine.budget == 256 and settings.engine.mix_lambda == 0.2
    assert KvSettings(budget_max=4096, policies=("rkv",)).budget_max == 4096
    monkeypatch.setenv("RKV_KV_REQUIRE_BUDGET", "perhaps")
    with pytest.raises(ValidationError) as refused:
        KvSettings()
    assert explain(refused.value, depth=1).startswith("require_budget: ")


def test_without_settings_everything_is_allowed_and_nothing_compacted() -> None:
    """Proves that the extension changes no request unless someone says so."""
    rules = RulesByApiKey.load(KvSettings()).of(None)
    assert resolved(rules)[0] == 0
    assert rules.bounds().model_dump() == {
        "object": "kv_cache.bounds",
        "budget": {
            "default": "full",
            "required": False,
            "min": 9,
            "max": None,
            "full": True,
            "auto": True,
            "min_budget": 1024,
        },
        "buffer": {"default": 128, "min": 8, "max": None},
        "policy": {"default": "invariant", "allowed": list(POLICY_NAMES)},
        "protect": {"default": 0},
        "summary": None,  # the server's, not its rules'
    }


def load(tmp_path: Path, text: str, **settings: Any) -> RulesByApiKey:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    return RulesByApiKey.load(KvSettings(key_policies=path, **settings))


def test_a_key_has_what_differs_and_the_servers_settings_for_the_rest(tmp_path: Path) -> None:
    """Proves that overrides are found by the digest of the API key, and only there."""
    rules = load(tmp_path, f"{DIGEST}: {{budget: 256}}", budget=512, budget_max=1024)
    of_key = rules.of(KEY)
    assert (of_key.budget, of_key.budget_max) == (256, 1024)
    for other in (None, "", DIGEST, "another"):
        assert rules.of(other).budget == 512
    assert not any(KEY in line or DIGEST in line for line in rules.describe())


def test_budget_auto_is_refused_where_whole_pages_leave(tmp_path: Path) -> None:
    """Proves that the field is named before the engine sees the request, for every caller and in either form,
    that clients are told, and that no default slips through."""
    rules = load(tmp_path, f"{DIGEST}: {{budget: 256}}", granularity="page", budget=512)
    for each in (rules.of(None), rules.of(KEY)):
        for asked in (
            KvCacheRequest(budget="auto"),
            read_xargs({"rkv_budget": "auto", "rkv_min_budget": 64}),
        ):
            with pytest.raises(
                KvCacheError, match=r'may not be "auto" here: it needs granularity token'
            ) as refused:
                each.resolve(asked)
            assert refused.value.field == "budget"
        assert not each.bounds().budget.auto and each.bounds().budget.full
        assert resolved(each, budget=64) == (64, 128, "invariant") and resolved(each, budget="full")[0] == 0
    with pytest.raises(ValueError, match=rf'key {DIGEST[:12]}\.\.\.: budget: the default, "auto", needs'):
        load(tmp_path, f"{DIGEST}: {{budget: auto}}", granularity="page")
    with pytest.raises(ValueError, match='budget: the default, "auto", needs granularity token'):
        RulesByApiKey.load(KvSettings(granularity="page", budget="auto"))
    token = load(tmp_path, f"{DIGEST}: {{budget: auto}}", budget=512).of(KEY)
    assert token.bounds().budget.auto and token.resolve(KvCacheRequest()).rkv_budget == "auto"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"{KEY}: {{budget: 256}}", "SHA-256"),
        (f"{DIGEST.upper()}: {{budget: 256}}", "SHA-256"),
        (f"{DIGEST}: {{budgets: 256}}", "budgets: "),
        (f"{DIGEST}: {{budget: 4096}}", "budget: "),
        (f"{DIGEST}: 256", "takes settings"),
        ("[1]", "digests"),
        ("a: b: c", "not YAML"),
        ("", "digests"),
    ],
)
def test_a_wrong_file_is_refused_and_shows_no_key(tmp_path: Path, text: str, named: str) -> None:
    """Proves that the message says where the mistake is; a key written there by mistake stays out of logs."""
    with pytest.raises(ValueError, match=named) as refused:
        load(tmp_path, text, budget=512, budget_max=1024)
    assert "keys.yaml" in str(refused.value)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (512, ""),
        ([], ""),
        ("full", ""),
        ({"budget": 512, "kept": 1}, "kept"),
        ({"budget": "512"}, "budget"),
        ({"budget": 512.0}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": [512]}, "budget"),
        ({"budget": 0}, "budget"),
        ({"budget": 8}, "budget"),
        ({"budget": 2**31}, "budget"),
        ({"budget": "FULL"}, "budget"),
        ({"buffer": 7}, "buffer"),
        ({"buffer": "full"}, "buffer"),
        ({"policy": "RKV"}, "policy"),
        ({"policy": 1}, "policy"),
        ({"budget": "25"}, "budget"),
        ({"budget": "0%"}, "budget"),
        ({"budget": "200%"}, "budget"),
        ({"protect": -1}, "protect"),
        ({"protect": 1.5}, "protect"),
        ({"protect": True}, "protect"),
        ({"protect": "10%"}, "protect"),
        ({"protect": "system"}, "protect"),
    ],
)
def test_a_wrong_object_is_refused_by_member(value: Any, field: str) -> None:
    """Proves that types are not coerced and that the message quotes what was sent."""
    with pytest.raises(KvCacheError) as refused:
        read_kv_cache(value)
    assert refused.value.field == field
    assert refused.value.param(xargs=False) == ("kv_cache." + field).rstrip(".")
    assert "Input should" not in str(refused.value), "our words, not pydantic's"


@pytest.mark.parametrize("read", [read_kv_cache, read_xargs])
@pytest.mark.parametrize("text", ["9" * 10_000, "\ud800", "\n\x1b", "\ud800" * 10_000, "a.b"])
def test_a_message_has_bounded_length_and_can_be_sent(read: Callable[[Any], Any], text: str) -> None:
    """Proves that a refusal does not echo what a client sent without end, and escapes it, in both forms."""
    prefix = XARGS_PREFIX if read is read_xargs else ""
    for value in ({f"{prefix}budget": text}, {f"{prefix}policy": [text]}, {f"{prefix}{text}": 1}):
        with pytest.raises(KvCacheError) as refused:
            read(value)
        param = refused.value.param(xargs=read is read_xargs)
        assert (str(refused.value) + param).isascii() and (str(refused.value) + param).isprintable()
        assert len(str(refused.value) + param) < 300
        assert not str(refused.value).startswith(XARGS_PREFIX), "the message goes behind the name"


def test_absent_and_null_are_the_same() -> None:
    """Proves that a client which sends its unset fields as null gets the defaults."""
    nothing = {"budget": None, "buffer": None, "policy": None, "protect": None}
    assert read_kv_cache(None) == read_kv_cache({}) == read_kv_cache(nothing) == KvCacheRequest()


def test_flat_keys_mean_the_same() -> None:
    """Proves that `vllm_xargs` with 0 is `full`, that others' keys are left alone, and what is refused."""
    assert read_xargs({"rkv_budget": 0, "session_id": "a"}) == KvCacheRequest(budget="full")
    xargs = {"rkv_budget": "25%", "rkv_buffer": 16, "rkv_policy": "snapkv", "rkv_protect": "prompt"}
    assert read_xargs(xargs) == KvCacheRequest(budget="25%", buffer=16, policy="snapkv", protect="prompt")
    assert read_xargs(None) == KvCacheRequest()
    wrong: dict[str, Any]
    for wrong in ({"rkv_budget": 8}, {"rkv_budget": True}, {"rkv_budget": "full"}, {"rkv_kept": 1}):
        with pytest.raises(KvCacheError) as refused:
            read_xargs(wrong)
        assert refused.value.param(xargs=True) == f"vllm_xargs.{next(iter(wrong))}"


def test_what_the_engine_is_told_is_valid_there() -> None:
    """Proves that the engine reads the resolved settings as they were meant."""
    request = BOUNDED.resolve(KvCacheRequest(budget=1024))
    assert RequestedSettings.from_extra_args(request.model_dump()) == request
