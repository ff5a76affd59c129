"""The operator's settings, and what they make of vLLM's options."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from asgi_stubs import Echo, client, drive
from pydantic import ValidationError
from typer.testing import CliRunner

from rkv_vllm.cli import app as commands
from rkv_vllm.server.operations import OperationSettings, OperationsMiddleware, prepare


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are undone."""
    for name in ("VLLM_API_KEY", "VLLM_USE_RUST_FRONTEND", "RKV_API_KEYS", "RKV_LIMIT_MAX_TOKENS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def vllm_options(**options: Any) -> Namespace:
    defaults = {
        "grpc": False,
        "api_key": None,
        "override_generation_config": {},
        "disable_uvicorn_access_log": False,
    }
    return Namespace(**{**defaults, **options})


def test_settings_come_back_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each process of the server reads there what the first one was given, and a flag goes before it."""
    monkeypatch.setenv("RKV_LIMIT_N", "2")
    monkeypatch.setenv("RKV_LIMIT_CONCURRENT", "7")
    settings = OperationSettings(
        api_keys=["k1", "k2"], api_key_file=tmp_path, open_metrics=True, open_routes="/a, /b", limit_n=3
    )
    variables = settings.to_environment()
    assert variables["RKV_API_KEYS"] == "k1,k2"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    again = OperationSettings()
    assert again == settings
    assert (again.limit_n, again.limit_concurrent, again.open_routes) == (3, 7, ["/a", "/b"])


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_n": 0},
        {"access_log": "xml"},
        {"open_routes": ["load"]},
        {"limit_body_bytes": None},
        {"x": 1},
    ],
)
def test_refuses_wrong_settings(settings: dict[str, Any]) -> None:
    """At start, not at the first request."""
    with pytest.raises(ValidationError):
        OperationSettings(**settings)


def test_takes_vllms_keys_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would guard a part of the routes with them, and refuse ours there."""
    monkeypatch.setenv("RKV_API_KEYS", "ours")
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    options = vllm_options(api_key=["theirs"])
    prepare(options)
    assert options.api_key is None
    keys = OperationSettings().read_keys()
    assert all(keys.name_of(key) for key in ("ours", "theirs", "from-environment"))

    async def test() -> None:
        async with client(OperationsMiddleware(Echo())) as http:
            assert (await http.get("/health")).status_code == 200
            assert [(await http.get(path)).status_code for path in ("/health/", "/ready/")] == [307, 307]
            assert [(await http.get(path)).status_code for path in ("/v1/models/", "/metrics/")] == [401, 401]
            assert (await http.get("/metrics")).status_code == 401
            authorization = {"authorization": "Bearer theirs"}
            assert (await http.get("/metrics", headers=authorization)).status_code == 200

    drive(test)


def test_open_metrics_are_open_with_a_slash_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scraper may write it; a path that only looks like it needs a key."""
    monkeypatch.setenv("RKV_API_KEYS", "ours")
    monkeypatch.setenv("RKV_OPEN_METRICS", "true")

    async def test() -> None:
        async with client(OperationsMiddleware(Echo())) as http:
            assert (await http.get("/metrics/")).json()["path"] == "/metrics"
            paths = ("/metrics//", "/metrics/x/", "/health//", "/v1/completions/", "/v1/completions//")
            assert {(await http.post(path)).status_code for path in paths} == {401}

    drive(test)


@pytest.mark.parametrize(
    ("options", "variable"), [({"grpc": True}, {}), ({}, {"VLLM_USE_RUST_FRONTEND": "1"})]
)
def test_refuses_servers_that_it_cannot_guard(
    options: dict[str, Any], variable: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take no middleware."""
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="unguarded"):
        prepare(vllm_options(**options))


@pytest.mark.parametrize(("theirs", "limit"), [({}, 100), ({"max_new_tokens": 50}, 50), ({"top_k": 1}, 100)])
def test_the_token_limit_also_holds_where_none_is_asked_for(
    theirs: dict[str, int], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own setting, the smaller one of two."""
    monkeypatch.setenv("RKV_LIMIT_MAX_TOKENS", "100")
    options = vllm_options(override_generation_config=theirs)
    prepare(options)
    assert options.override_generation_config == {**theirs, "max_new_tokens": limit}


def test_an_empty_file_of_keys_is_refused(tmp_path: Path) -> None:
    """It would leave the server open to all."""
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    result = CliRunner().invoke(commands, ["serve", "some/model", "--api-key-file", str(file)])
    assert result.exit_code == 2
    assert "holds no API key" in " ".join(result.output.replace("│", " ").split())
