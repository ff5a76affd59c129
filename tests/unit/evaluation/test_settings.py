"""What a command line asks for becomes settings of requests, and nothing else does."""

from __future__ import annotations

import pytest

from rkv_vllm.evaluation.settings import (
    FULL_CACHE,
    Budget,
    Setting,
    grid,
    parse_budgets,
    parse_buffers,
    parse_policies,
    parse_protects,
)
from rkv_vllm.settings.requested import RequestedSettings


def test_the_grid_has_the_full_cache_first_and_each_setting_once() -> None:
    """Proves that the full cache is compared with, asked for or not, and that nothing runs twice."""
    budgets = parse_budgets("512,1024,25%")
    settings = grid(budgets, ["rkv", "recency"], [64], [0], full_length=2048)
    names = ["full", "rkv:512:64", "recency:512:64", "rkv:1024:64", "recency:1024:64"]
    assert [setting.name for setting in settings] == names
    assert grid(parse_budgets("full"), ["rkv"], [64], [0], 0) == [FULL_CACHE]


def test_percent_of_the_mean_length() -> None:
    """Proves that a share comes to the nearest token, keeps what it was asked as, and may have decimals."""
    assert parse_budgets("10%, 37.5%") == [Budget(10, True), Budget(37.5, True)]
    assert [Budget(percent, True).tokens(2097) for percent in (10, 16, 24, 37)] == [210, 336, 503, 776]
    [_, setting] = grid(parse_budgets("10%"), ["rkv"], [128], [0], 2097)
    assert (setting.budget, setting.percent) == (210, 10)


def test_auto_beside_fixed_budgets() -> None:
    """Proves that budget auto has its minimum in tokens or percent, and is no fixed budget."""
    budgets = parse_budgets("24%,auto:24%, auto:512")
    assert budgets == [Budget(24, True), Budget(24, True, True), Budget(512, False, True)]
    settings = grid(budgets, ["rkv"], [64], [0, 16], 2097)
    assert [setting.name for setting in settings] == [
        "full",
        *("rkv:503:64", "rkv:503:64:16"),
        *("rkv:auto:503:64", "rkv:auto:503:64:16"),
        *("rkv:auto:512:64", "rkv:auto:512:64:16"),
    ]
    asked = RequestedSettings.from_extra_args(settings[3].extra_args)
    assert (asked.rkv_budget, asked.rkv_min_budget, asked.rkv_buffer) == ("auto", 503, 64)


def test_a_share_within_the_window_is_refused() -> None:
    """Proves that a percentage that leaves no token to choose is named, with what it comes to."""
    with pytest.raises(ValueError, match="10 % of 80 tokens is 8"):
        grid(parse_budgets("10%"), ["rkv"], [128], [0], 80)


@pytest.mark.parametrize(
    "word",
    [
        *("8", "0", "-5", "1.5", "0%", "101%", "%", "x%", "10%5", "full%", "nan%", "inf"),
        *("auto", "auto:", "auto:8", "auto:full", "auto:auto:512", "auto:0%"),
    ],
)
def test_a_wrong_budget_is_named(word: str) -> None:
    """Proves that what is neither tokens nor percent is refused by its name."""
    with pytest.raises(ValueError, match=f"--kv-budget: .*'{word}'"):
        parse_budgets(f"full,512,{word}")


def test_what_is_protected_makes_settings_of_its_own() -> None:
    """Proves that protection is one more dimension of the grid, in the names and in the requests."""
    settings = grid(parse_budgets("512"), ["rkv"], [64], parse_protects("0, 16,prompt"), 0)
    assert [setting.name for setting in settings] == [
        "full",
        "rkv:512:64",
        "rkv:512:64:16",
        "rkv:512:64:prompt",
    ]
    assert [setting.extra_args.get("rkv_protect") for setting in settings] == [None, 0, 16, "prompt"]
    for word in ("-1", "1.5", "all", "full"):
        with pytest.raises(ValueError, match=f"--kv-protect: .*'{word}'"):
            parse_protects(f"0,{word}")


def test_wrong_policies_and_buffers_are_named() -> None:
    """Proves that the other two lists are checked too."""
    with pytest.raises(ValueError, match=r"--kv-policy: .*best"):
        parse_policies("rkv,best")
    for word in ("7", "-8", "x", "1.5"):
        with pytest.raises(ValueError, match=f"--kv-buffer: .*'{word}'"):
            parse_buffers(f"128,{word}")


def test_the_engine_reads_what_a_setting_says() -> None:
    """Proves that a setting's keys are those of a request, the full cache's too."""
    asked = RequestedSettings.from_extra_args(Setting("snapkv", 512, 64).extra_args)
    assert (asked.rkv_policy, asked.rkv_budget, asked.rkv_buffer) == ("snapkv", 512, 64)
    assert RequestedSettings.from_extra_args(FULL_CACHE.extra_args).rkv_budget == 0
