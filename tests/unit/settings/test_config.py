"""Settings of a server and of a request: bounds, types, defaults and what an error says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from rkv_vllm.settings.config import WINDOW, AutoBudget, CompactionSettings, RkvConfig, extra_args
from rkv_vllm.settings.policy_table import POLICY_NAMES
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import CannotBeServed, RequestedSettings
from rkv_vllm.settings.values import Switch


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("budget", WINDOW),
        ("budget", 0),
        ("budget", -1),
        ("budget", 64.0),
        ("budget", "64"),
        ("budget", True),
        ("buffer", WINDOW - 1),
        ("buffer", 128.0),
        ("buffer", "128"),
        ("buffer", None),
        ("buffer", True),
        ("policy", "lru"),
        ("policy", None),
        ("mix_lambda", -0.1),
        ("mix_lambda", 1.5),
        ("mix_lambda", float("nan")),
        ("beyond_pool", "perhaps"),
        ("beyond_pool", True),
        ("granularity", "layer"),
        ("granularity", None),
        ("scope", "token"),
        ("scope", None),
        ("order", "time"),
        ("colour", "red"),
        ("budget", "automatic"),
        ("min_budget", WINDOW),
        ("min_budget", "auto"),
        ("max_budget", 1024),
        ("max_budget", "25%"),
        ("auto_usage", 0.0),
        ("auto_usage", 1.1),
    ],
)
def test_server_refuses(setting: str, value: Any) -> None:
    """Proves that a server-wide setting out of bounds, of a wrong type or unknown is refused by its name."""
    with pytest.raises(ValidationError) as refused:
        RkvConfig.model_validate({setting: value})
    assert [problem["loc"][0] for problem in refused.value.errors()] == [setting]


def test_server_accepts_its_bounds() -> None:
    """Proves that the smallest budget and buffer are accepted, and that the defaults compact nothing."""
    config = RkvConfig(budget=WINDOW + 1, buffer=WINDOW)
    assert (config.budget, config.buffer) == (WINDOW + 1, WINDOW)
    assert RkvConfig().resolve(RequestedSettings(), SIZE) is None


def test_a_pool_below_max_model_len_needs_a_budget() -> None:
    """Proves that the opt-in takes any right budget, and that a wrong one alone is what the error names."""
    assert RkvConfig(budget=64, beyond_pool=True).beyond_pool
    assert not RkvConfig(beyond_pool=False).beyond_pool
    with pytest.raises(ValidationError) as refused:
        RkvConfig(budget=3, beyond_pool=True)
    assert [problem["loc"][0] for problem in refused.value.errors()] == ["budget"]


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"scope": "layer"}, ["scope"]),
        ({"scope": "global"}, ["scope"]),
        ({"order": "score"}, ["order"]),
        ({"scope": "global", "order": "score"}, ["scope", "order"]),
    ],
)
def test_scope_and_order_are_for_tokens(settings: dict[str, Any], fields: list[str]) -> None:
    """Proves that whole pages refuse another scope or order by name, and their only one not."""
    RkvConfig.model_validate(settings)
    RkvConfig(granularity="page", scope="head", order="temporal")
    with pytest.raises(ValidationError, match="needs granularity token") as refused:
        RkvConfig.model_validate({**settings, "granularity": "page"})
    assert [problem["loc"][0] for problem in refused.value.errors()] == fields


def test_server_config_is_frozen() -> None:
    """Proves that settings in force cannot be changed behind the engine's back."""
    with pytest.raises(ValidationError):
        RkvConfig().budget = 64  # type: ignore[misc]


def test_additional_config() -> None:
    """Proves that settings are found under `rkv`, and that a missing key is explained."""
    assert RkvConfig.from_additional_config({"rkv": {"budget": 99}, "other": 1}).budget == 99
    with pytest.raises(ValueError, match=r"no key 'rkv'.*rkv_engine_args"):
        RkvConfig.from_additional_config({"other": 1})


@pytest.mark.parametrize("value", [WINDOW, 1, -1, 64.0, 0.0, "64", "off", True, [64], {"tokens": 64}])
def test_request_budget_refused(value: Any) -> None:
    """Proves that a wrong budget is refused with the field, what it takes and what it was."""
    with pytest.raises(ValueError) as refused:
        RequestedSettings.from_extra_args({"rkv_budget": value})
    assert str(refused.value) == (
        f'rkv_budget takes 0 (full cache), an integer above {WINDOW}, "auto" or a share as in '
        f'"25%", not {json.dumps(value)}'
    )


@pytest.mark.parametrize("value", [WINDOW - 1, 0, -8, 128.0, "128", True])
def test_request_buffer_refused(value: Any) -> None:
    """Proves that a wrong buffer is refused by name and value."""
    with pytest.raises(ValueError) as refused:
        RequestedSettings.from_extra_args({"rkv_buffer": value})
    assert str(refused.value) == f"rkv_buffer takes an integer of at least {WINDOW}, not {json.dumps(value)}"


@pytest.mark.parametrize("value", ["lru", "RKV", "", 1, True])
def test_request_policy_refused(value: Any) -> None:
    """Proves that a wrong policy is refused with all names that there are."""
    with pytest.raises(ValueError, match=f"rkv_policy takes one of {', '.join(POLICY_NAMES)}, not "):
        RequestedSettings.from_extra_args({"rkv_policy": value})


def test_unknown_request_field_refused() -> None:
    """Proves that a misspelt field of ours is refused together with the names that there are."""
    with pytest.raises(ValueError, match=r"rkv_bugdet is unknown .*rkv_budget, rkv_buffer, rkv_policy"):
        RequestedSettings.from_extra_args({"rkv_bugdet": 64})


def test_all_wrong_fields_in_one_line() -> None:
    """Proves that one error names each wrong field once."""
    with pytest.raises(ValueError) as refused:
        RequestedSettings.from_extra_args({"rkv_budget": 1, "rkv_buffer": 1, "rkv_policy": 1, "rkv_x": 1})
    message = str(refused.value)
    assert "\n" not in message
    assert [part.split()[0] for part in message.split("; ")] == [
        "rkv_budget",
        "rkv_buffer",
        "rkv_policy",
        "rkv_x",
    ]


@pytest.mark.parametrize("extra_args", [None, {}, {"temperature_of_tea": "hot"}, {"rkv": 5}])
def test_foreign_arguments_are_left_alone(extra_args: dict[str, Any] | None) -> None:
    """Proves that arguments of others ask for nothing and are not refused."""
    assert RequestedSettings.from_extra_args(extra_args) == RequestedSettings()


SERVER = RkvConfig(budget=64, buffer=32, policy="keydiff")
SIZE = RequestSize(prompt=40, longest=300)


@pytest.mark.parametrize(
    ("server", "asked", "in_force"),
    [
        (SERVER, {}, CompactionSettings(64, 32, "keydiff")),
        (SERVER, {"rkv_budget": None}, CompactionSettings(64, 32, "keydiff")),
        (SERVER, {"rkv_budget": 0}, None),
        (SERVER, {"rkv_budget": 0, "rkv_buffer": 16}, None),
        (SERVER, {"rkv_budget": 9}, CompactionSettings(9, 32, "keydiff")),
        (SERVER, {"rkv_buffer": 8}, CompactionSettings(64, 8, "keydiff")),
        (SERVER, {"rkv_policy": "rkv"}, CompactionSettings(64, 32, "rkv")),
        (RkvConfig(), {}, None),
        (RkvConfig(), {"rkv_buffer": 8, "rkv_policy": "random"}, None),
        (RkvConfig(), {"rkv_budget": 50}, CompactionSettings(50, 128, "invariant")),
    ],
)
def test_settings_in_force(
    server: RkvConfig, asked: dict[str, Any], in_force: CompactionSettings | None
) -> None:
    """Proves that what a request names wins, the rest is the server's, and 0 is the full cache."""
    assert server.resolve(RequestedSettings.from_extra_args(asked), SIZE) == in_force


@pytest.mark.parametrize(
    ("share", "longest", "tokens"),
    [("25%", 400, 100), ("25%", 401, 101), ("0.5%", 4000, 20), ("100%", 77, 77), ("33.333%", 3000, 1000)],
)
def test_a_share_is_of_the_longest_that_a_request_may_become(share: str, longest: int, tokens: int) -> None:
    """Proves the exact number, rounded up, for a request's own share and for the server's."""
    size = RequestSize(prompt=10, longest=longest)
    asked = RequestedSettings.from_extra_args({"rkv_budget": share})
    for server, request in ((SERVER, asked), (RkvConfig(budget=share), RequestedSettings())):
        settings = server.resolve(request, size)
        assert settings is not None and settings.budget == tokens


def test_a_share_leaves_a_token_to_choose() -> None:
    """Proves that a share of a short request is brought above the window, and not refused."""
    settings = RkvConfig(budget="1%").resolve(RequestedSettings(), RequestSize(prompt=5, longest=50))
    assert settings is not None and settings.budget == WINDOW + 1


@pytest.mark.parametrize("share", ["0%", "101%", "-5%", "%", "25", "25 %", "1e1%", "25%%", "\u0662%"])
def test_a_wrong_share_is_refused(share: str) -> None:
    """Proves that what is no percentage above 0 and up to 100 is refused by its name, in both places."""
    with pytest.raises(ValidationError, match="budget"):
        RkvConfig(budget=share)
    with pytest.raises(ValueError, match=r"rkv_budget takes .* or a share"):
        RequestedSettings.from_extra_args({"rkv_budget": share})


def test_what_is_protected() -> None:
    """Proves whose word counts, and that the prompt is as long as the request's own."""
    server = RkvConfig(budget=64, protect=20)
    for asked, protect in (({}, 20), ({"rkv_protect": 0}, 0), ({"rkv_protect": "prompt"}, SIZE.prompt)):
        settings = server.resolve(RequestedSettings.from_extra_args(asked), SIZE)
        assert settings is not None and settings.protect == protect


@pytest.mark.parametrize("protect", [55, "prompt"])
def test_what_is_protected_leaves_a_token_to_choose(protect: int | str) -> None:
    """Proves the bound against the budget at its edge: protected tokens, the window, and one more."""
    asked = RequestedSettings.from_extra_args({"rkv_protect": protect})
    size = RequestSize(prompt=55, longest=900)
    for budget in (55 + WINDOW + 1, 55 + WINDOW):
        if budget > 55 + WINDOW:
            assert RkvConfig(budget=budget).resolve(asked, size) is not None
            continue
        with pytest.raises(CannotBeServed, match=rf"at least {55 + WINDOW + 1}"):
            RkvConfig(budget=budget).resolve(asked, size)
    assert RkvConfig(budget=64).resolve(RequestedSettings(rkv_budget=0, rkv_protect=500), size) is None


def test_a_server_protects_no_more_than_its_budget_holds() -> None:
    """Proves that defaults that exclude each other are refused at start, by the name of the field."""
    with pytest.raises(ValidationError, match="do not fit into a budget of 64") as refused:
        RkvConfig(budget=64, protect=56)
    assert [problem["loc"] for problem in refused.value.errors()] == [("protect",)]
    RkvConfig(budget=64, protect=55)
    RkvConfig(budget="10%", protect=5000)  # each request is looked at


@pytest.mark.parametrize("settings", [None, CompactionSettings(19, 8, "snapkv", 10)])
def test_what_is_sent_is_what_is_read(settings: CompactionSettings | None) -> None:
    """Proves that a request that names its settings gets them, the full cache too, whatever the defaults."""
    assert SERVER.resolve(RequestedSettings.from_extra_args(extra_args(settings)), SIZE) == settings


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_request_budget_derives(policy: Any) -> None:
    """Proves the threshold, and that exactly the attention-based policies need queries."""
    budget = CompactionSettings(64, 32, policy)
    assert budget.threshold == 96
    assert budget.num_queries == {"rkv": 8, "snapkv": 8, "invariant": min(16, budget.buffer)}.get(policy, 0)


def test_auto_needs_tokens() -> None:
    """Proves that whole pages refuse budget "auto", of the server by name and of a request alone."""
    with pytest.raises(ValidationError, match="needs granularity token") as refused:
        RkvConfig(budget="auto", granularity="page")
    assert [problem["loc"][0] for problem in refused.value.errors()] == ["granularity"]
    with pytest.raises(CannotBeServed, match='budget "auto" needs granularity token'):
        RkvConfig(granularity="page").resolve(RequestedSettings(rkv_budget="auto"), SIZE)


def test_auto_of_a_request() -> None:
    """Proves whose word counts for a request with budget "auto", and that it sends what it was given."""
    server = RkvConfig(budget="auto", min_budget=128, max_budget=4096)
    settings = server.resolve(RequestedSettings(), SIZE)
    assert settings is not None and (settings.budget, settings.auto) == (128, AutoBudget(4096, None))
    asked = {"rkv_min_budget": 64, "rkv_max_budget": 100, "rkv_switch_at": 9216}
    own = server.resolve(RequestedSettings.from_extra_args(asked), SIZE)
    assert own is not None and (own.budget, own.auto) == (64, AutoBudget(100, (Switch(9216, 64),)))
    steps = {"rkv_min_budget": 64, "rkv_switch_at": ["1490:745", "1800:64"]}
    told = server.resolve(RequestedSettings.from_extra_args(steps), SIZE)
    assert told is not None and told.auto == AutoBudget(4096, (Switch(1490, 745), Switch(1800, 64)))
    assert RkvConfig().resolve(RequestedSettings.from_extra_args(extra_args(told)), SIZE) == told
    for wrong in (0, -1, 1.5, True, [], [1490], ["1490"], ["1490:0"], ["0:9"], ["1490:745 "], "1490:745"):
        with pytest.raises(ValueError, match="rkv_switch_at takes an integer above 0, or a list of steps"):
            RequestedSettings.from_extra_args({"rkv_switch_at": wrong})
    assert RkvConfig().resolve(RequestedSettings.from_extra_args(extra_args(own)), SIZE) == own
    with pytest.raises(CannotBeServed, match="100 is not above min_budget, 128"):
        server.resolve(RequestedSettings(rkv_max_budget=100), SIZE)
    with pytest.raises(CannotBeServed, match="do not fit into a budget of 64"):
        server.resolve(RequestedSettings(rkv_min_budget=64, rkv_protect=60), SIZE)
    with pytest.raises(ValidationError, match="do not fit into a budget of 128"):
        RkvConfig(budget="auto", min_budget=128, protect=120)


@pytest.mark.parametrize("field", ["rkv_min_budget", "rkv_max_budget", "rkv_switch_at"])
def test_what_is_for_auto_alone(field: str) -> None:
    """Proves that a field which a fixed budget has no use for is refused by name, not overlooked."""
    with pytest.raises(ValueError, match=f"{field}: only with budget"):
        RequestedSettings.from_extra_args({"rkv_budget": 64, field: 512})
    with pytest.raises(CannotBeServed, match=f"{field}: only with budget"):
        RkvConfig(budget=64).resolve(RequestedSettings.from_extra_args({field: 512}), SIZE)
    with pytest.raises(ValueError, match=f"{field} takes an integer"):
        RequestedSettings.from_extra_args({"rkv_budget": "auto", field: "many"})
