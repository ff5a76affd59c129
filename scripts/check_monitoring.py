"""Prove dashboards and rules against real parts: a served model under load, scraped by Prometheus.

Run by `make monitoring`. promtool checks the rules and runs their unit tests; then every expression of every
panel and rule is evaluated over the run; all must return data, except alerts, of which every metric must. The
panels' data are drawn into docs/monitoring.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from draw_panels import Drawing, Line, draw

from rkv_vllm.demo.model import prepare
from rkv_vllm.demo.server import free_port, serving

ROOT = Path(__file__).resolve().parent.parent
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
PICTURES = ROOT / "docs" / "monitoring"
#: What Grafana would put in place of its variables.
VARIABLES = {"$__rate_interval": "15s", "$model_name": ".*", "$engine": ".*"}
STEP_SECONDS = 2
OPTIONS = [
    *("--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log"),
    *("--block-size", "32", "--kv-cache-memory-bytes", "128M"),
    *("--num-gpu-blocks-override", "28"),  # too few for all requests at once
    *("--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
    *("--kv-budget", "64", "--kv-buffer", "32"),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"rkv_budget": 0},
    {"rkv_policy": "recency"},
    {"rkv_budget": 128},
    {"rkv_budget": 300},
    {"rkv_policy": "keydiff"},
    {"rkv_budget": "auto", "rkv_min_budget": 64},
]


@dataclass(frozen=True)
class Expression:
    where: str
    text: str
    must_have_data: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prometheus", type=Path, required=True, help="folder of prometheus and promtool")
    parser.add_argument("--seconds", type=int, default=60, help="of load (default: 60)")
    arguments = parser.parse_args()
    promtool = arguments.prometheus / "promtool"
    for command in (["check", "rules", RULES], ["test", "rules", RULES.with_name("rules_test.yml")]):
        subprocess.run([promtool, *command], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "server.log")
        with (
            serving(prepare(), "smollm2", OPTIONS, log, lambda _: None) as url,
            scraping(arguments.prometheus / "prometheus", url, Path(scratch)) as prometheus,
        ):
            began = time.time()
            ended = asyncio.run(load(url, arguments.seconds))
            print(f"{ended} requests answered")
            time.sleep(3 * STEP_SECONDS)
            span = {"start": began, "end": time.time(), "step": STEP_SECONDS}
            failures = sum(evaluate(prometheus, span, expression) for expression in rule_expressions())
            failures += sum(check_dashboard(prometheus, span, path) for path in DASHBOARDS)
    print("all expressions hold" if failures == 0 else f"{failures} expressions have no data")
    return int(failures > 0)


async def load(url: str, seconds: int) -> int:
    """Keeps twelve requests in flight for this time, and returns how many were answered."""
    until = time.monotonic() + seconds

    async def client(index: int) -> int:
        answered = 0
        async with httpx.AsyncClient(timeout=300) as http:
            while time.monotonic() < until:
                number = index + answered
                body = {
                    "model": "smollm2",
                    "prompt": "Tell a story about the sea. " * (1 + number % 9),
                    "max_tokens": 40 + 37 * (number % 7),
                    "ignore_eos": True,
                    "vllm_xargs": SETTINGS[number % len(SETTINGS)],
                }
                (await http.post(f"{url}/v1/completions", json=body)).raise_for_status()
                answered += 1
        return answered

    return sum(await asyncio.gather(*(client(index) for index in range(12))))


@contextmanager
def scraping(binary: Path, target: str, scratch: Path) -> Iterator[str]:
    """Prometheus on a free port with our rules, scraping `target` each second; yields its URL."""
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [target.removeprefix("http://")]}]}
        ],
    }
    file = scratch / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    command = [
        *(binary, f"--config.file={file}", f"--storage.tsdb.path={scratch / 'tsdb'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (scratch / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(url: str) -> None:
    for _ in range(120):
        try:
            if httpx.get(f"{url}/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.25)
    raise TimeoutError("Prometheus is not ready after 30 s")


def rule_expressions() -> Iterator[Expression]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            name = rule.get("record") or rule["alert"]
            yield Expression(f"rules: {name}", rule["expr"], must_have_data="record" in rule)
            # An alert is silent on a healthy server, and so is one that reads what does not exist.
            for metric in sorted(set(re.findall(r"(?:rkv_|vllm:|engine:)[\w:]+", rule["expr"]))):
                yield Expression(f"rules: {name}: {metric}", metric, must_have_data=True)


def check_dashboard(prometheus: str, span: dict[str, float], path: Path) -> int:
    """Evaluates and draws one dashboard; returns how many of its expressions had no data."""
    dashboard, failures, drawings = json.loads(path.read_text()), 0, []
    for panel in dashboard["panels"]:
        lines: list[Line] = []
        for target in panel["targets"]:
            expression = Expression(f"{dashboard['title']}: {panel['title']}", target["expr"], True)
            failures += evaluate(prometheus, span, expression, lines, target["legendFormat"])
        defaults = panel["fieldConfig"]["defaults"]
        drawings.append(Drawing(panel["title"], defaults.get("unit", "short"), lines))
    PICTURES.mkdir(parents=True, exist_ok=True)
    PICTURES.joinpath(f"{path.stem}.svg").write_text(draw(dashboard["title"], drawings))
    return failures


def evaluate(
    prometheus: str,
    span: dict[str, float],
    expression: Expression,
    lines: list[Line] | None = None,
    legend: str = "",
) -> int:
    """1 where the expression should have had data over the run and had none, else 0; adds what it had.

    Raises: httpx.HTTPStatusError where Prometheus refuses the expression.
    """
    query = expression.text
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    response = httpx.post(f"{prometheus}/api/v1/query_range", data={"query": query, **span}, timeout=60)
    response.raise_for_status()
    points = 0
    for series in response.json()["data"]["result"]:
        values = [(time, float(value)) for time, value in series["values"] if not math.isnan(float(value))]
        points += len(values)
        if lines is not None and values:
            lines.append(Line(legend_of(legend, series["metric"]), values))
    is_missing = expression.must_have_data and points == 0
    print(f"{'MISSING' if is_missing else 'ok':8}{points:6} points  {expression.where}")
    return int(is_missing)


def legend_of(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


if __name__ == "__main__":
    sys.exit(main())
