"""What the server would refuse when it starts, the chart refuses when it renders."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from chart import CHART, DIGEST, EVERYTHING, Values, container, merged, refusal, render

from rkv_vllm.host.compatibility import FEATURES
from rkv_vllm.server.caller_rules import KvSettings
from rkv_vllm.server.rules_by_api_key import RulesByApiKey
from rkv_vllm.settings.command_line import TAKEN

#: Rules for budgets, as values below `kvCache`: every combination is tried.
BUDGETS: dict[str, list[Any]] = {
    "budget": ["full", "auto", 8, 512, 1024],
    "budgetMin": [None, 512, 2048],
    "budgetMax": [None, 512, 1024],
    "requireBudget": [False, True],
    "beyondPool": [False, True],
}
#: Rules for one API key, which lie over all combinations of the rest.
OVERRIDES: list[Values] = [
    {},
    {"budget": "full"},
    {"budget": 512},
    {"budget_max": None},
    {"budget_min": None, "budget_max": 512},
    {"budget_min": 600, "budget": 700},
    {"require_budget": False},
    {"require_budget": True, "budget_max": 9},
    {"policies": ["snapkv"]},
    {"policies": ["snapkv"], "policy": "snapkv"},
    {"protect": "prompt"},
    {"protect": 1000},
    {"budget": "10%", "protect": 4000},
    {"budget": "auto", "min_budget": 600},
    {"budget": "auto", "protect": 1020},
    {"max_budget": 1024},
    {"max_budget": 1024, "min_budget": 512},
]
#: Values that would reach the server beside those that are checked.
BESIDE: list[tuple[Values, str]] = [
    ({"extraEnv": [{"name": "RKV_KV_BUDGET_MIN", "value": "4"}]}, "extraEnv: RKV_KV_BUDGET_MIN"),
    ({"extraEnv": [{"name": "rkv_access_log", "value": "xml"}]}, "extraEnv: rkv_access_log"),
    ({"extraEnv": [{"name": "VLLM_USE_RUST_FRONTEND", "value": "1"}]}, "extraEnv: the server does not take"),
    ({"extraEnv": [{"name": "VLLM_API_KEY", "value": "a,b"}]}, "extraEnv: VLLM_API_KEY"),
    ({"engine": {"extraArgs": ["--kv-budget=4"]}}, "engine.extraArgs: --kv-budget=4"),
    ({"engine": {"extraArgs": ["--kv_cache_dtype", "nvfp4"]}}, "engine.extraArgs: the server takes --kv-cac"),
    ({"engine": {"extraArgs": ["-tp", "2"]}}, "engine.extraArgs: -tp"),
]


def server_refuses(values: Values, folder: Path) -> bool:
    """Whether the settings of the server refuse what stands below `kvCache`."""
    given = {re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", name): values[name] for name in values}
    given = {name: value for name, value in given.items() if value not in (None, [], {})}
    if "key_policies" in given:
        file = folder / "key-policies.yaml"
        file.write_text(yaml.safe_dump(given["key_policies"]))
        given["key_policies"] = file
    try:
        settings = KvSettings(**given)
        settings.engine  # noqa: B018 - checks the engine's own settings together
        RulesByApiKey.load(settings)
    except ValueError:
        return True
    return False


def combinations(choices: dict[str, list[Any]]) -> list[Values]:
    return [dict(zip(choices, chosen, strict=True)) for chosen in product(*choices.values())]


@pytest.mark.parametrize(
    "cases",
    [
        combinations(BUDGETS),
        combinations(
            {
                "budget": [
                    "full",
                    64,
                    "25%",
                    "0.5%",
                    "100%",
                    "0%",
                    "00.0%",
                    "101%",
                    "25 %",
                    "7.%",
                    "1000000%",
                ],
                "protect": [0, 55, 56, "prompt", -1, "system"],
                "budgetMax": [None, 64],
                "requireBudget": [False, True],
            }
        ),
        combinations(
            {
                "budget": ["auto"],
                "minBudget": [None, 8, 64],
                "maxBudget": [None, 64, 2048],
                "protect": [0, 60],
                "granularity": ["token", "page"],
                "autoUsage": [None, 1.5],
            }
        ),
        combinations({"policy": ["rkv", "random"], "policies": [[], ["rkv"], ["snapkv", "random"]]}),
        combinations(
            {
                "granularity": ["token", "page"],
                "scope": ["head", "layer", "global"],
                "order": ["temporal", "score"],
                "buffer": [7, 8],
                "mixLambda": [None, 0, 1.5],
            }
        ),
        [
            rules | {"keyPolicies": {DIGEST: own}}
            for rules in combinations(BUDGETS | {"budget": [512, 1024], "beyondPool": [False]})
            for own in OVERRIDES
        ],
    ],
    ids=["budgets", "shares", "auto", "policies", "engine", "keys"],
)
def test_the_chart_refuses_the_settings_that_the_server_refuses(cases: list[Values], tmp_path: Path) -> None:
    """Proves that both refuse the same settings of the KV cache: no pod ends for one, and none is lost."""
    refused = [server_refuses(case, tmp_path) for case in cases]
    assert any(refused) and not all(refused)
    found = [refusal({"kvCache": case}) for case in cases]
    assert [text is not None for text in found] == refused
    assert all("kvCache" in text for text in found if text)


def test_one_decision_for_all_heads_needs_one_gpu() -> None:
    """Proves that the chart refuses several GPUs where the engine does, by the engine's own rule."""
    [rule] = [each for each in FEATURES if "a shared scope with tensor" in each.name]
    assert rule.in_use is not None
    for granularity, scope, gpus in product(["token", "page"], ["head", "layer", "global"], [0, 1, 2]):
        if granularity == "page" and scope != "head":
            continue  # refused on any number of GPUs
        engine: Any = SimpleNamespace(
            additional_config={"rkv": {"granularity": granularity, "scope": scope}},
            parallel_config=SimpleNamespace(world_size=max(gpus, 1)),
        )
        found = refusal({"kvCache": {"granularity": granularity, "scope": scope}, "gpu": {"count": gpus}})
        assert (found is not None) == rule.in_use(engine)
        assert found is None or "gpu.count" in found
    found = refusal({"kvCache": {"granularity": "page"}, "engine": {"extraArgs": ["-pp=2"]}})
    assert found is not None and "kvCache.granularity" in found


@pytest.mark.parametrize(("values", "named"), BESIDE)
def test_no_setting_comes_by_another_way(values: Values, named: str) -> None:
    """Proves that options and variables which end the server, or change what was checked, are refused."""
    found = refusal(values)
    assert found is not None and f": {named}" in found


def test_options_that_the_server_refuses_are_refused_by_the_chart() -> None:
    """Proves that the chart's list names options of vLLM, with all that the server's own list has, and
    that each is refused in every way to write it."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rkv_vllm.host.moved import make_arg_parser

    text = (CHART / "templates" / "_validate.tpl").read_text()
    [names] = re.findall(r"\$refused := list ([^}]*)}}", text)
    refused = set(re.findall(r'"([^"]+)"', names))
    parser = make_arg_parser(FlexibleArgumentParser(prog="rkv-vllm"))
    known = {option for action in parser._actions for option in action.option_strings}
    assert {name.removeprefix("--") for name in TAKEN} <= refused
    assert {f"-{name}" if len(name) < 4 and name != "grpc" else f"--{name}" for name in refused} <= known
    for name in refused:
        for word in (f"--{name}", f"--{name}=1", f"--{name.replace('-', '_')}.a=1"):
            found = refusal({"engine": {"extraArgs": ["--enforce-eager", word]}})
            assert found is not None and f"engine.extraArgs: the server does not take {word}" in found


def test_options_of_the_chart_come_from_its_values_alone() -> None:
    """Proves that no option which the chart may set is taken as a further one, which would go before it."""
    words = container(render(merged(EVERYTHING, {"engine": {"extraArgs": []}})))["args"][1:]
    for option in {word.partition("=")[0] for word in words} | {"--open-metrics"}:
        found = refusal({"engine": {"extraArgs": [f"{option}=1"]}})
        assert found is not None and f"engine.extraArgs: {option}=1" in found
