"""The Helm chart, rendered by Helm's own library."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest.mock import patch

import pytest
import yaml
from chart import (
    CHART,
    DIGEST,
    EVERYTHING,
    EXAMPLES,
    NAMESPACE,
    ROOT,
    container,
    example,
    of_kind,
    pod,
    render,
    the,
)
from helm_python.chart import lint, package
from kubernetes_types import VERSIONS, check_types
from typer.testing import CliRunner

from rkv_vllm import __version__
from rkv_vllm.cli import app
from rkv_vllm.server.caller_rules import KvSettings
from rkv_vllm.server.operations import OperationSettings
from rkv_vllm.server.rules_by_api_key import RulesByApiKey
from rkv_vllm.settings.policy_table import POLICY_NAMES

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
#: Every example of a server, the defaults, and everything that can be switched on.
EXAMPLE_NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml") if not path.stem.endswith("-router"))
VALUE_SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{name: example(name) for name in EXAMPLE_NAMES},
    "all": EVERYTHING,
}
EVERY_ARGUMENT = """
--host=0.0.0.0 --port=8000 --served-model-name=reasoner --tensor-parallel-size=4 --block-size 16
--kv-budget=1024 --kv-budget-min=512 --kv-budget-max=4096 --kv-require-budget --kv-buffer=128
--kv-min-budget=256 --kv-max-budget=16384 --kv-auto-usage=0.8
--kv-policy=rkv --kv-policies=rkv,snapkv --kv-protect=0 --kv-mix-lambda=0.25 --kv-granularity=token
--kv-scope=head --kv-order=temporal --kv-beyond-pool
--kv-key-policies=/etc/rkv-vllm/policies/key-policies.yaml
--max-model-len=8192 --max-num-seqs=64 --gpu-memory-utilization=0.9 --limit-body-bytes=67108864
--limit-max-tokens=4096 --limit-n=2 --limit-concurrent=9 --limit-concurrent-per-key=3
--open-routes=/tokenize,/detokenize --access-log=json --api-key-file=/etc/rkv-vllm/keys/api-keys
--shutdown-timeout=120
"""


def arguments(values: dict[str, Any]) -> list[str]:
    found: list[str] = container(render(values))["args"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VALUE_SETS)
def test_objects_follow_kubernetes_schemas(name: str, version: str) -> None:
    """Strictly, for the oldest Kubernetes that the chart takes and the newest there are schemas for."""
    objects = render(VALUE_SETS[name])
    assert len(objects) >= 3
    check_types(objects, version)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_names_and_labels_hold_together(name: str) -> None:
    """Each object has a name of its own kind; every selector is the one that never changes and finds the
    pods; scaling finds the Deployment."""
    objects = render(VALUE_SETS[name])
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(names) == len(set(names))
    deployment = the("Deployment", objects)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    fixed = deployment["spec"]["selector"]["matchLabels"]
    assert fixed.items() <= labels.items()
    selectors = [the("Service", objects)["spec"]["selector"]]
    selectors += [
        found["spec"]["selector"]["matchLabels"] for found in of_kind(objects, "PodDisruptionBudget")
    ]
    selectors += [found["spec"]["podSelector"]["matchLabels"] for found in of_kind(objects, "NetworkPolicy")]
    assert all(selector == fixed for selector in selectors)
    for found in of_kind(objects, "ServiceMonitor"):
        service = the("Service", objects)["metadata"]["labels"]
        assert found["spec"]["selector"]["matchLabels"].items() <= service.items()
    for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        for found in of_kind(objects, kind):
            assert found["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
            assert "replicas" not in deployment["spec"], "an upgrade would undo what the autoscaler did"


@pytest.mark.parametrize("name", VALUE_SETS)
def test_volumes_that_are_mounted_exist(name: str) -> None:
    """And the Secrets and ConfigMaps of the chart's own that they come from are made."""
    objects = render(VALUE_SETS[name])
    volumes = {volume["name"]: volume for volume in pod(objects)["volumes"]}
    assert {mount["name"] for mount in container(objects)["volumeMounts"]} == set(volumes)
    made = {(found["kind"], found["metadata"]["name"]) for found in objects}
    keys = VALUE_SETS[name].get("apiKeys", {})
    if "key-policies" in volumes:
        assert ("ConfigMap", volumes["key-policies"]["configMap"]["name"]) in made
    if "api-keys" in volumes and "existingSecret" not in keys:
        assert ("Secret", volumes["api-keys"]["secret"]["secretName"]) in made
    if "persistentVolumeClaim" in volumes["cache"]:
        assert ("PersistentVolumeClaim", volumes["cache"]["persistentVolumeClaim"]["claimName"]) in made


@pytest.mark.parametrize("name", VALUE_SETS)
def test_the_server_takes_the_arguments(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command itself parses them, its own flags and, with vLLM's parser, all others."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rkv_vllm.host.moved import make_arg_parser
    from rkv_vllm.server import launch

    given: list[list[str]] = []
    monkeypatch.setattr(launch, "launch", given.append)
    (tmp_path / "api-keys").write_text("alice sk-alice\n")
    (tmp_path / "key-policies.yaml").write_text(yaml.safe_dump({DIGEST: {"budget": 1024}}))
    words = [
        word.replace("/etc/rkv-vllm/keys", str(tmp_path)).replace("/etc/rkv-vllm/policies", str(tmp_path))
        for word in arguments(VALUE_SETS[name])
    ]
    with patch.dict(os.environ):  # which `serve` changes for vLLM's processes
        result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code == 0, result.output
    [serve] = given
    parser = make_arg_parser(FlexibleArgumentParser(prog="rkv-vllm"))
    parsed = parser.parse_args(serve)
    values = VALUE_SETS[name]
    assert parsed.model_tag == values.get("model", VALUES["model"])
    assert parsed.shutdown_timeout == values.get("shutdown", {}).get(
        "drainSeconds", VALUES["shutdown"]["drainSeconds"]
    )


def test_every_bound_reaches_the_server() -> None:
    """No setting of the server that a value is for is forgotten, and large numbers stay whole."""
    words = arguments(VALUE_SETS["all"])
    assert words[0] == VALUES["model"]
    assert set(EVERY_ARGUMENT.split()) == set(words[1:])
    flags = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words}
    settings = {f"kv_{name}" for name in KvSettings.model_fields}
    settings |= set(OperationSettings.model_fields) - {"api_keys", "open_metrics"}
    assert settings <= flags
    assert "--open-metrics" in arguments({"openMetrics": True})


def undescribed(schema: dict[str, Any], path: str) -> list[str]:
    """Values below `schema` without a description, and objects that would take a misspelt one."""
    found = [path] if "description" not in schema else []
    if "properties" in schema and schema.get("additionalProperties") is not False:
        found.append(f"{path} (open)")
    for name, property in schema.get("properties", {}).items():
        found += undescribed(property, f"{path}.{name}")
    return found


def test_every_value_is_described_and_has_a_default() -> None:
    """values.yaml and its schema name the same values, and no object takes others."""
    assert undescribed(SCHEMA, "") == []

    def missing(values: dict[str, Any], schema: dict[str, Any], path: str) -> list[str]:
        properties = schema.get("properties")
        if properties is None:
            return []
        here = [f"{path}.{name}" for name in values.keys() ^ properties.keys()]
        for name in values.keys() & properties.keys():
            if isinstance(values[name], dict):
                here += missing(values[name], properties[name], f"{path}.{name}")
        return here

    assert missing(VALUES, SCHEMA, "") == [".global"]


def test_the_chart_has_every_setting_of_the_server() -> None:
    """Proves that values below `kvCache` are the server's settings, with the same choices."""
    properties = SCHEMA["properties"]["kvCache"]["properties"]
    camel_case = {
        re.sub(r"_(\w)", lambda match: match[1].upper(), name): name for name in KvSettings.model_fields
    }
    assert properties.keys() == camel_case.keys()
    for value, name in camel_case.items():
        annotation = KvSettings.model_fields[name].annotation
        if get_origin(annotation) is Literal:
            assert properties[value]["enum"] == list(get_args(annotation)), value
    assert properties["policies"]["items"]["enum"] == list(POLICY_NAMES)


def test_lint_finds_nothing() -> None:
    """`helm lint --strict`."""
    report = lint(CHART, strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"] if message["severity"] > 1] == []


def test_dashboards_and_rules_have_one_source(tmp_path: Path) -> None:
    """The package, too, which is made from links, has the files of deploy/grafana and deploy/prometheus."""
    values = {"dashboards": {"enabled": True}, "prometheusRule": {"enabled": True}}
    for chart in (CHART, Path(package(CHART, destination=tmp_path))):
        objects = render(values, chart)
        dashboards = {
            name: json.loads(text)
            for found in of_kind(objects, "ConfigMap")
            for name, text in found["data"].items()
        }
        files = (ROOT / "deploy" / "grafana").glob("*.json")
        assert dashboards == {path.name: json.loads(path.read_text()) for path in files}
        assert all(
            found["metadata"]["labels"]["grafana_dashboard"] == "1" for found in of_kind(objects, "ConfigMap")
        )
        rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
        assert the("PrometheusRule", objects)["spec"] == rules


@pytest.mark.parametrize("seconds", [(10, 120, 20), (0, 5, 10), (30, 900, 60)])
def test_the_stop_fits_into_the_grace_period(seconds: tuple[int, int, int]) -> None:
    """It is the sum of what comes one after the other, and the server is told its part of it."""
    before, drain, engine = seconds
    objects = render({"shutdown": {"preStopSeconds": before, "drainSeconds": drain, "engineSeconds": engine}})
    assert pod(objects)["terminationGracePeriodSeconds"] == sum(seconds)
    assert container(objects)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(before)]
    assert f"--shutdown-timeout={drain}" in container(objects)["args"]


def test_the_pod_is_confined() -> None:
    """No root, nothing writable but its volumes, no token of the cluster; the user is that of the images."""
    objects = render()
    spec, server = pod(objects), container(objects)
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    user = f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
    for file in ("Dockerfile", "Dockerfile.cpu"):
        assert f"\nUSER {user}\n" in (ROOT / "docker" / file).read_text()
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["mountPath"] for mount in server["volumeMounts"]} == {"/cache", "/dev/shm", "/tmp"}


def test_gpus_and_the_cpu_image() -> None:
    """A GPU is a limit of its own beside the others; without one nothing asks for it."""
    assert container(render())["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 1}
    assert container(render(example("cpu")))["resources"]["limits"] == {"memory": "8Gi"}
    assert not any("tensor-parallel" in word for word in arguments({}))


def test_a_change_of_keys_starts_the_pods_anew() -> None:
    """Keys and policies are read at start."""

    def checksum(values: dict[str, Any]) -> str:
        metadata = the("Deployment", render(values))["spec"]["template"]["metadata"]
        found: str = metadata["annotations"]["checksum/settings"]
        return found

    checksums = {
        checksum({}),
        checksum({"apiKeys": {"entries": {"alice": "a"}}}),
        checksum({"apiKeys": {"entries": {"alice": "b"}}}),
        checksum({"kvCache": {"keyPolicies": {DIGEST: {"budget": 512}}}}),
    }
    assert len(checksums) == 4


def test_the_files_of_keys_and_policies_are_those_that_the_server_reads(tmp_path: Path) -> None:
    """As the Secret and the ConfigMap hold them."""
    objects = render(VALUE_SETS["all"])
    keys, policies = tmp_path / "keys", tmp_path / "policies.yaml"
    keys.write_text(the("Secret", objects)["stringData"]["api-keys"])
    read = OperationSettings(api_key_file=keys).read_keys()
    assert (read.name_of("sk-alice"), read.name_of("sk-prometheus")) == ("alice", "prometheus")
    [text] = [
        found["data"]["key-policies.yaml"]
        for found in of_kind(objects, "ConfigMap")
        if "key-policies.yaml" in found["data"]
    ]
    policies.write_text(text)
    settings = KvSettings(budget=1024, key_policies=policies)
    assert RulesByApiKey.load(settings).by_key[DIGEST].budget == 512


def test_scaling_asks_for_metrics_of_this_release_alone() -> None:
    """KEDA's queries name namespace and Service, as the ServiceMonitor labels what it scrapes."""
    objects = render(example("production"))
    triggers = the("ScaledObject", objects)["spec"]["triggers"]
    selector = f'{{namespace="{NAMESPACE}",service="{the("Service", objects)["metadata"]["name"]}"}}'
    assert [trigger["metadata"]["query"] for trigger in triggers] == [
        f"sum(vllm:num_requests_waiting{selector})",
        f"avg(vllm:kv_cache_usage_perc{selector})",
    ]
    assert [trigger["metricType"] for trigger in triggers] == ["AverageValue", "Value"]
    assert [trigger["metadata"]["threshold"] for trigger in triggers] == ["4", "0.85"]


def test_the_routers_routes_are_open() -> None:
    """Proves that the pods answer what production-stack's router hands on, and what neither router asks for
    stays closed."""
    opened = [word for word in arguments(example("production-stack")) if word.startswith("--open-routes")]
    assert opened == ["--open-routes=/tokenize,/detokenize"]
    assert not any(word.startswith("--open-routes") for word in arguments(example("llm-d")))


def test_routers_find_the_pods() -> None:
    """The labels, the port and the open metrics that the examples' routers rely on are their pods' own."""
    for name in ("production-stack", "llm-d"):
        objects = render(example(name))
        labels = the("Deployment", objects)["spec"]["template"]["metadata"]["labels"]
        assert "--open-metrics" in container(objects)["args"]
        [port] = container(objects)["ports"]
        router = example(f"{name}-router")
        if name == "llm-d":
            selector = router["router"]["modelServers"]["matchLabels"]
            [config] = router["router"]["epp"]["pluginsCustomConfig"].values()
            plugins = yaml.safe_load(config)
            used = {
                plugin["pluginRef"]
                for profile in plugins["schedulingProfiles"]
                for plugin in profile["plugins"]
            }
            assert used <= {plugin["type"] for plugin in plugins["plugins"]}
            assert {"prefix-cache-scorer", "session-affinity-scorer"} <= used
        else:
            words = router["routerSpec"]["extraArgs"]
            flags = dict(zip(words[::2], words[1::2], strict=True))
            selector = dict([flags["--k8s-label-selector"].split("=")])
            assert int(flags["--k8s-port"]) == port["containerPort"]
        assert selector.items() <= labels.items()


def test_versions_agree() -> None:
    """Chart, images and package are released together."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    for file in ("Dockerfile", "Dockerfile.cpu"):
        text = (ROOT / "docker" / file).read_text()
        assert f'org.opencontainers.image.version="{__version__}"' in text
        assert f"-t rkv-vllm:{__version__}" in text
