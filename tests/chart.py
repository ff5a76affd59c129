"""The chart as Helm renders it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import yaml
from helm_python.chart import Chart
from helm_python.errors import HelmRenderError, HelmValuesError

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "rkv-vllm"
EXAMPLES = ROOT / "deploy" / "helm" / "examples"
RELEASE, NAMESPACE = "demo", "serving"

#: Of an API key.
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

Object = dict[str, Any]
Values = dict[str, Any]

#: Values that switch everything on.
EVERYTHING: Values = {
    "fullnameOverride": "reasoner",
    "image": {"pullSecrets": [{"name": "registry"}]},
    "servedModelName": "reasoner",
    "gpu": {"count": 4},
    "kvCache": {
        "budget": 1024,
        "budgetMin": 512,
        "budgetMax": 4096,
        "minBudget": 256,
        "maxBudget": 16384,
        "autoUsage": 0.8,
        "requireBudget": True,
        "policy": "rkv",
        "policies": ["rkv", "snapkv"],
        "mixLambda": 0.25,
        "beyondPool": True,
        "keyPolicies": {DIGEST: {"budget": 512}},
    },
    "engine": {
        "maxModelLen": 8192,
        "maxNumSeqs": 64,
        "gpuMemoryUtilization": 0.9,
        "extraArgs": ["--block-size", "16"],
    },
    "limits": {
        "bodyBytes": 67108864,
        "maxTokens": 4096,
        "answers": 2,
        "concurrent": 9,
        "concurrentPerKey": 3,
    },
    "apiKeys": {"entries": {"alice": "sk-alice", "prometheus": "sk-prometheus"}},
    "openRoutes": ["/tokenize", "/detokenize"],
    "huggingFaceToken": {"existingSecret": "hugging-face"},
    "modelCache": {"type": "persistentVolumeClaim", "storageClass": "fast"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "p"}, "apiKeySecret": "prometheus"},
    "prometheusRule": {"enabled": True, "labels": {"release": "p"}},
    "dashboards": {"enabled": True, "annotations": {"grafana_folder": "rkv-vllm"}},
    "autoscaling": {"enabled": True},
    "podDisruptionBudget": {"enabled": True},
    "networkPolicy": {"enabled": True, "allowDownloads": False},
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "podLabels": {"team": "maths"},
    "podAnnotations": {"a": "b"},
    "extraEnv": [{"name": "VLLM_NO_USAGE_STATS", "value": "1"}],
    "extraVolumes": [{"name": "models", "hostPath": {"path": "/models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "serving",
    "runtimeClassName": "nvidia",
}


class KubernetesYaml(yaml.SafeLoader):
    """YAML as Kubernetes reads it: by version 1.1, as PyYAML does, with some more that is no text in Go."""

    bool_values = {**yaml.SafeLoader.bool_values, "y": True, "n": False}  # noqa: RUF012


for tag, pattern, first in (
    ("bool", r"^[yYnN]$", "yYnN"),
    ("int", r"^[-+]?0o[0-7_]+$", "-+0"),
    ("float", r"^[-+]?[0-9]*\.?[0-9]+[eE][-+]?[0-9]+$", "-+.0123456789"),
):
    KubernetesYaml.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


def render(
    values: dict[str, Any] | None = None, chart: Path = CHART, *, release: str = RELEASE
) -> list[Object]:
    """The objects that `helm install RELEASE` would make in the namespace `serving`.

    Raises: HelmValuesError and HelmRenderError, as Helm refuses values.
    """
    with Chart.load(chart) as loaded:
        files = loaded.render(values or {}, name=release, namespace=NAMESPACE)
    manifests = (text for path, text in files.items() if path.endswith(".yaml"))
    return [found for text in manifests for found in yaml.load_all(text, KubernetesYaml) if found]


def refusal(values: Values) -> str | None:
    """Why the chart refuses these values; None where it takes them."""
    try:
        render(values)
    except (HelmRenderError, HelmValuesError) as error:
        return str(error)
    return None


def nested(path: str, value: Any) -> Values:
    for name in reversed(path.split(".")):
        value = {name: value}
    return cast(Values, value)


def merged(below: Values, above: Values) -> Values:
    """`above` over `below`, as Helm merges values."""
    found = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            found[name] = merged(below[name], above[name])
    return found


def example(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    return values


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def the(kind: str, objects: list[Object]) -> Object:
    [found] = of_kind(objects, kind)
    return found


def pod(objects: list[Object]) -> Object:
    spec: Object = the("Deployment", objects)["spec"]["template"]["spec"]
    return spec


def container(objects: list[Object]) -> Object:
    [found] = pod(objects)["containers"]
    assert isinstance(found, dict)
    return found
