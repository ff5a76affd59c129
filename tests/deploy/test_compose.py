"""The compose file, as Docker Compose itself reads it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rkv_vllm import __version__
from rkv_vllm.server.caller_rules import KvSettings
from rkv_vllm.server.operations import OperationSettings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose"
GPU, CPU = ("compose.yaml",), ("compose.yaml", "compose.cpu.yaml")


def config(files: tuple[str, ...], **environment: str) -> dict[str, Any]:
    """What `docker compose config` makes of the files."""
    command: list[str | Path] = [Path(sys.executable).with_name("docker-compose")]
    for file in files:
        command += ["-f", COMPOSE / file]
    path = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    result = subprocess.run(
        [*command, "config", "--format", "json"], env={**path, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "level=warning" not in result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    return {
        volume["target"]: Path(volume["source"]) for volume in service["volumes"] if volume["type"] == "bind"
    }


@pytest.mark.parametrize("files", [GPU, CPU], ids=["gpu", "cpu"])
def test_services_images_and_addresses(files: tuple[str, ...]) -> None:
    """Three services; images have versions; nothing listens beyond this machine unless it is asked to."""
    services = config(files)["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+(-cpu)?$", service["image"]), service["image"]
        assert [port["host_ip"] for port in service["ports"]] == ["127.0.0.1"]
    [port] = config(files, BIND="0.0.0.0")["services"]["server"]["ports"]
    assert port["host_ip"] == "0.0.0.0"


def test_the_server_with_a_gpu_and_without() -> None:
    """The image of its kind, built here; a GPU only where there is one; the CPU image's own command."""
    gpu, cpu = config(GPU)["services"]["server"], config(CPU)["services"]["server"]
    assert (gpu["image"], cpu["image"]) == (f"rkv-vllm:{__version__}", f"rkv-vllm:{__version__}-cpu")
    for server in (gpu, cpu):
        assert Path(server["build"]["context"]) == ROOT
        assert (ROOT / server["build"]["dockerfile"]).is_file()
        assert server["read_only"] and server["cap_drop"] == ["ALL"]
        assert {"/cache"} <= {volume["target"] for volume in server["volumes"]}
        assert server["tmpfs"] == ["/tmp"]
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in cpu and cpu.get("command") is None


def test_settings_are_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each RKV_ variable is one that the server knows, and the values that are passed through are valid."""
    asked = {"RKV_KV_BUDGET": "2048", "RKV_API_KEYS": "sk-a,sk-b", "MODEL": "Qwen/Qwen3-8B"}
    server = config(GPU, **asked)["services"]["server"]
    assert (
        server
        == config(GPU, **{name.removeprefix("RKV_"): value for name, value in asked.items()})["services"][
            "server"
        ]
    ), "the older names go on working"
    assert config(GPU)["services"]["server"]["environment"]["RKV_KV_BUDGET"] == "1024"
    assert server["command"][0] == "Qwen/Qwen3-8B"
    known = {f"RKV_{name}".upper() for name in OperationSettings.model_fields}
    known |= {f"RKV_KV_{name}".upper() for name in KvSettings.model_fields}
    ours = {name: value for name, value in server["environment"].items() if name.startswith("RKV_")}
    assert ours.keys() <= known
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    assert KvSettings().budget == 2048
    assert OperationSettings().api_keys == ["sk-a", "sk-b"]
    assert OperationSettings().open_metrics


@pytest.mark.parametrize("files", [GPU, CPU], ids=["gpu", "cpu"])
def test_a_stop_has_the_time_it_needs(files: tuple[str, ...]) -> None:
    """Compose waits longer than the server drains and its engine takes to end."""
    server = config(files)["services"]["server"]
    minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(\d+)s", server["stop_grace_period"]).groups("0")  # type: ignore[union-attr]
    words = server.get("command") or ["--shutdown-timeout", "30"]  # the server's default
    drain = int(words[words.index("--shutdown-timeout") + 1])
    assert int(minutes) * 60 + int(seconds) >= drain + 20


def test_prometheus_and_grafana_read_the_repositorys_files() -> None:
    """Not copies of them; and what the mounted configurations name is where the mounts put it."""
    services = config(GPU)["services"]
    prometheus, grafana = mounts(services["prometheus"]), mounts(services["grafana"])
    assert prometheus["/etc/prometheus/rules.yml"] == ROOT / "deploy" / "prometheus" / "rules.yml"
    assert grafana["/var/lib/grafana/dashboards"] == ROOT / "deploy" / "grafana"
    for source in (*prometheus.values(), *grafana.values()):
        assert source.exists()
    scraping = yaml.safe_load(prometheus["/etc/prometheus/prometheus.yml"].read_text())
    assert [f"/etc/prometheus/{file}" for file in scraping["rule_files"]] == ["/etc/prometheus/rules.yml"]
    [job] = scraping["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert int(port) == services[name]["ports"][0]["target"]
    [source] = yaml.safe_load((COMPOSE / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0]['target']}"
    [provider] = yaml.safe_load((COMPOSE / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert provider["options"]["path"] in grafana
