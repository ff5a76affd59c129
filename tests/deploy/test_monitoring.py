"""Dashboards and rules as far as they can be judged without Prometheus; `make monitoring` does the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from roundtrip import lost

from rkv_vllm.observability.metric_table import TALLIED
from rkv_vllm.observability.prometheus import BUILD_INFO, QUERY_RING_BYTES

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
METRICS = {metric.name: metric for metric in (*TALLIED, BUILD_INFO, QUERY_RING_BYTES)}


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def unknown_names(expression: str) -> set[str]:
    """Names with our prefix that no metric and no series of a histogram has; recorded ones have a colon."""
    names = set(re.findall(r"(?<![\w:])rkv_\w+", expression))
    return {name for name in names if re.sub(r"_(bucket|sum|count)$", "", name) not in METRICS}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_follows_grafanas_schema(path: Path) -> None:
    """Grafana's own types, generated from its schema, read it and write every field of it back."""
    register_default_plugins()
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem
    written = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert lost(dashboard, written) == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_ask_for_metrics_that_exist_and_name_them(path: Path) -> None:
    """Each panel's description names a metric that its expressions read."""
    for panel in json.loads(path.read_text())["panels"]:
        expressions = " ".join(target["expr"] for target in panel["targets"])
        assert not unknown_names(expressions), panel["title"]
        described = re.findall(r"(?:rkv_|vllm:)\w+", panel["description"])
        assert any(name in expressions for name in described), panel["title"]


def test_rules_read_metrics_that_exist() -> None:
    """Ours by the table, recorded ones by the rules before."""
    recorded: set[str] = set()
    for rule in rules():
        assert not unknown_names(rule["expr"]), rule
        assert set(re.findall(r"engine:\w+:\w+", rule["expr"])) <= recorded, rule
        recorded |= {rule["record"]} if "record" in rule else set()


def test_every_alert_has_its_paragraph() -> None:
    """Under the heading that its annotation links to."""
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in rules():
        if "alert" in rule:
            assert f"\n### {rule['alert']}\n" in page
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_label_value_asked_for_exists() -> None:
    """A misspelt outcome would silently match nothing."""
    texts = [path.read_text().replace('\\"', '"') for path in DASHBOARDS]
    texts += [rule["expr"] for rule in rules()]
    outcomes = {value for text in texts for value in re.findall(r'outcome="(\w+)"', text)}
    assert outcomes == {"executed", "cancelled"} == set(METRICS["rkv_compactions_total"].labels["outcome"])
