"""Dashboards and rules ask only for metrics that the catalogue declares, with labels that those metrics have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from connito.runtime.metrics import CATALOGUE

from .conftest import CHART, ROOT

RULES = yaml.safe_load((CHART / "files/rules.yaml").read_text())["groups"]
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((CHART / "files/dashboards").glob("*.json"))}
RECORDED = {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}
# What Prometheus adds to every series.
TARGET_LABELS = {"component", "instance", "job", "pod", "le", "namespace", "release", "persistentvolumeclaim"}

NAME = re.compile(r"connito(?::[a-z0-9_]+)+|connito_[a-z0-9_]+")
SELECTOR = re.compile(r"(connito_[a-z0-9_]+)\{([^}]*)\}")


def queries() -> list[tuple[str, str]]:
    """(where, PromQL) of every panel and rule."""
    found = [
        (f"{group['name']}/{rule.get('alert', rule.get('record'))}", rule["expr"])
        for group in RULES
        for rule in group["rules"]
    ]
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            found += [(f"{name}/{panel['title']}", target["expr"]) for target in panel.get("targets", [])]
    return found


def declared(name: str) -> str:
    """The catalogue's name of a series: histograms answer under three."""
    if name in CATALOGUE:
        return name
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    assert CATALOGUE.get(base) is not None, f"{name} is not in the catalogue"
    assert CATALOGUE[base].kind == "histogram", f"{name} is not a histogram's series"
    return base


def test_there_is_something_to_check() -> None:
    assert set(DASHBOARDS) == {"platform", "run", "miner"}
    assert len(queries()) > 60


@pytest.mark.parametrize(("where", "expression"), queries(), ids=lambda value: value if "/" in value[:40] else "")
def test_queries_know_their_metrics(where: str, expression: str) -> None:
    names = NAME.findall(expression)
    assert names or re.search(r"\b(up|gnatsd_\w+|kubelet_\w+|SeaweedFS_\w+)\{?", expression), (
        f"{where} asks for nothing of ours"
    )
    for name in names:
        if ":" in name:
            assert name in RECORDED, f"{where} asks for {name}, which no rule records"
        else:
            declared(name)
    for name, selector in SELECTOR.findall(expression):
        for label in re.findall(r"([a-z_]+)\s*[=!]", selector):
            assert label in {*CATALOGUE[declared(name)].labels, *TARGET_LABELS}, f"{where}: {name} has no label {label}"


def test_counters_are_never_read_raw_by_alerts() -> None:
    for group in RULES:
        for rule in group["rules"]:
            for name in re.findall(r"connito_[a-z_]+_total", rule["expr"]):
                # Or by the appearance of a series that was not there before.
                assert re.search(rf"(rate|increase)\({name}|{name}[^)]* unless {name}", rule["expr"]), rule


def test_alerts_say_what_to_do() -> None:
    for group in RULES:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in {"warning", "critical"}
                assert rule["annotations"]["summary"]
                assert rule["annotations"]["action"].endswith(".")


def test_every_panel_says_what_to_do() -> None:
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                assert len(panel["description"]) > 20, (name, panel["title"])


def test_the_promtool_tests_cover_every_alert() -> None:
    tested = {
        case["alertname"]
        for path in (ROOT / "deploy/prometheus").glob("rules*_test.yaml")
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert tested == {rule["alert"] for group in RULES for rule in group["rules"] if "alert" in rule}


def test_what_is_generated_is_current(tmp_path: Path) -> None:
    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)

    run("deploy/grafana/dashboards.py", str(tmp_path))
    for path in sorted(tmp_path.glob("*.json")):
        current = (CHART / "files/dashboards" / path.name).read_text()
        assert path.read_text() == current, "run scripts/generate-dashboards and commit the result"
    pages = {"values": "helm-values.md", "metrics": "metrics.md", "alerts": "alerts.md"}
    for name, page in pages.items():
        script = f"generate-{name}-reference"
        run(f"scripts/{script}", str(tmp_path / page))
        current = (ROOT / "docs/reference" / page).read_text()
        assert (tmp_path / page).read_text() == current, f"run scripts/{script} and commit the result"
    served = (ROOT / "services/console/static/alerts.html").read_text()
    assert (tmp_path / "alerts.html").read_text() == served, (
        "run scripts/generate-alerts-reference and commit the result"
    )


def test_what_alerts_count_is_there_before_it_is_first_counted() -> None:
    """A process that did nothing yet exports the series whose first increase has to be seen."""
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import connito.runtime.metrics, prometheus_client as p; print(p.generate_latest().decode())",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for series in (
        'connito_store_errors_total{error="ObjectDamaged",operation="fetch"} 0.0',
        'connito_security_events_total{kind="bad_signature"} 0.0',
        'connito_messages_handled_total{durable="library",outcome="dead_letter"} 0.0',
        'connito_lease_lost_total{lease="coordinator"} 0.0',
        'connito_submissions_total{outcome="refused",reason=""} 0.0',
    ):
        assert series in said


def test_every_panel_is_filtered_by_what_is_chosen() -> None:
    for name, dashboard in DASHBOARDS.items():
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        assert {"namespace", "release"} <= variables
        assert dashboard["links"]
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                for metric, selector in re.findall(r"\b(connito_[a-z0-9_]+)(\{[^}]*\})?", target["expr"]):
                    assert "$namespace" in selector, (name, panel["title"], metric)
                    assert "$release" in selector, (name, panel["title"], metric)
                    if name == "run" and "run" in CATALOGUE[declared(metric)].labels:
                        assert "$run" in selector, panel["title"]


def test_alerts_of_two_releases_are_two() -> None:
    for group in RULES:
        for rule in group["rules"]:
            for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"]):
                assert "namespace" in labels, rule
