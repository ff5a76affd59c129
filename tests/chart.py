"""The chart as Helm renders it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from helm_python.chart import Chart

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "rkv-vllm"
EXAMPLES = ROOT / "deploy" / "helm" / "examples"
RELEASE, NAMESPACE = "demo", "serving"

Object = dict[str, Any]


def render(values: dict[str, Any] | None = None, chart: Path = CHART) -> list[Object]:
    """The objects that `helm install demo` would make in the namespace `serving`.

    Raises: HelmValuesError and HelmRenderError, as Helm refuses values.
    """
    with Chart.load(chart) as loaded:
        files = loaded.render(values or {}, name=RELEASE, namespace=NAMESPACE)
    manifests = (text for path, text in files.items() if path.endswith(".yaml"))
    return [found for text in manifests for found in yaml.safe_load_all(text) if found]


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
