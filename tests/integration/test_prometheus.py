"""A real Prometheus scrapes a real run: every metric of the catalogue is set, every panel's query returns data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from connito.platform.servers import free_ports
from connito.runtime.metrics import CATALOGUE

from tests.support.waiting import PATIENCE, wait_until

pytestmark = [pytest.mark.monitoring, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/connito"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((CHART / "files/dashboards").glob("*.json"))}
# Only said where the store or the bus uses TLS; tests/unit/connito/test_certificates.py sees it set by real servers.
# The server of a shelf is no part of a run.
NEEDS_SERVE = {"connito_serve_requests_total", "connito_serve_tokens_total"}
NEEDS_TLS = {"connito_certificate_expiry_timestamp_seconds"}
# Only said when something goes wrong. Declared without a series until then; panels show zero.
NEEDS_TROUBLE = {
    "connito_events_rejected_total",
    "connito_lease_lost_total",
    "connito_refusals_total",
    "connito_run_paused",
    "connito_security_events_total",
    "connito_store_errors_total",
    "connito_waiting",
}


def _tools() -> None:
    done = subprocess.run([ROOT / "scripts/install-image-tools"], check=False, capture_output=True, text=True)
    if done.returncode == 75:
        pytest.skip(f"NO PROMETHEUS: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def test_promtool_accepts_the_rules_and_their_tests() -> None:
    _tools()
    for command in (
        ["promtool", "check", "rules", str(CHART / "files/rules.yaml")],
        ["promtool", "test", "rules", *map(str, sorted((ROOT / "deploy/prometheus").glob("rules*_test.yaml")))],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    _tools()
    shutil.copy(ROOT / "deploy/prometheus/prometheus.yaml", tmp_path)
    shutil.copy(CHART / "files/rules.yaml", tmp_path)
    done = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yaml"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A Prometheus server that finds the processes of `connito up` in its data directory."""

    def __init__(self, folder: Path, ports: Path) -> None:
        self.folder, self.ports = folder, ports
        self.port = free_ports(1)[0]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        rules = yaml.safe_load((CHART / "files/rules.yaml").read_text())
        for group in rules["groups"]:
            group.pop("interval", None)  # as often as the scrapes of this test
        (self.folder / "rules.yaml").write_text(yaml.safe_dump(rules))
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {"job_name": "connito", "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}]}
            ],
        }
        (self.folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.find_targets()
        command = [
            "prometheus",
            f"--config.file={self.folder}/prometheus.yaml",
            f"--storage.tsdb.path={self.folder}/data",
        ]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{self.port}"], stdout=log, stderr=subprocess.STDOUT
            )

    def find_targets(self) -> int:
        """Write what is to be scraped: the ports that the services announced. Returns how many there are."""
        targets = []
        for path in sorted(self.ports.glob("*.json")):
            component = path.stem.rstrip("0123456789").rstrip("-").replace("miner", "trainer")
            port = json.loads(path.read_text())["http"]
            targets.append({"targets": [f"127.0.0.1:{port}"], "labels": {"component": component, "pod": path.stem}})
        fresh = self.folder / "targets.json.new"
        fresh.write_text(json.dumps(targets))
        fresh.replace(self.folder / "targets.json")
        return len(targets)

    def get(self, path: str, **query: str) -> Any:
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)["data"]

    def ask(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """After a run on the tiny base, still up and scraped."""
    _tools()
    data, folder = tmp_path_factory.mktemp("platform"), tmp_path_factory.mktemp("prometheus")
    environment = {**os.environ, "CONNITO_DATA_DIR": str(data)}
    connito = [sys.executable, "-c", "from connito.cli import main; main()"]
    server = Prometheus(folder, data / "ports")
    try:
        # Prometheus first, and more cycles than it can miss: rates are of what it saw change, and a server hands newly
        # found targets to its scrapers five seconds late.
        server.start()
        up = [
            *connito,
            "up",
            "--base",
            "tiny",
            "--cycles",
            "20",
            "--miners",
            "2",
            "--validators",
            "3",
            "--no-wait",
            "--json",
        ]
        with (folder / "up.log").open("wb") as log:
            starting = subprocess.Popen(up, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while starting.poll() is None:
            server.find_targets()
            time.sleep(0.1)
        assert starting.returncode == 0, (folder / "up.log").read_text()[-2000:]
        # Five services, three validators, two miners.
        wait_until(lambda: server.find_targets() == 10, "ten services to announce their ports")
        wait_until(lambda: len(server.ask("up == 1")) == 10, "ten targets to be scraped")
        wait_until(lambda: server.ask("connito_experts_deposited_total > 0"), "the run's expert in the library", 400)
        # Rates need two scrapes after the last event.
        seen = time.time()
        wait_until(lambda: server.ask(f"min(timestamp(up)) > {seen + 3}"), "another scrape")
        yield server
    finally:
        server.stop()
        subprocess.run([*connito, "down"], env=environment, check=False, capture_output=True, timeout=60)


def test_a_run_sets_every_metric(prometheus: Prometheus) -> None:
    names = set(prometheus.get("label/__name__/values"))
    missing = {
        name
        for name, metric in CATALOGUE.items()
        if not {name, f"{name}_count"} & names and name not in NEEDS_TLS | NEEDS_SERVE | NEEDS_TROUBLE
    }
    assert missing == set()


def test_what_services_say_is_in_the_catalogue(prometheus: Prometheus) -> None:
    said = {name for name in prometheus.get("label/__name__/values") if name.startswith("connito_")}
    known = {
        f"{name}{suffix}"
        for name, metric in CATALOGUE.items()
        for suffix in (["_bucket", "_sum", "_count", "_created"] if metric.kind == "histogram" else ["", "_created"])
    }
    # A counter's creation time drops `_total`.
    known |= {name.removesuffix("_total") + "_created" for name in CATALOGUE}
    assert said <= known


def test_labels_are_bounded(prometheus: Prometheus) -> None:
    series: dict[str, int] = {}
    for row in prometheus.ask('count by (__name__, pod) ({__name__=~"connito_.+", __name__!~".+_bucket"})'):
        series[row["metric"]["__name__"]] = max(series.get(row["metric"]["__name__"], 0), int(row["value"][1]))
    assert {name: count for name, count in series.items() if count > 40} == {}


@pytest.mark.parametrize(
    ("where", "expression"),
    [
        pytest.param(f"{name}/{panel['title']}", target["expr"], id=f"{name}/{panel['title']}/{target['refId']}")
        for name, dashboard in DASHBOARDS.items()
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ],
)
def test_every_panel_shows_data(prometheus: Prometheus, where: str, expression: str) -> None:
    if any(name in expression for name in NEEDS_TLS):
        pytest.skip(f"{where} needs TLS, which a run on one machine does not use")
    asked = expression.replace("$__rate_interval", "10m").replace("$run", ".*")
    asked = asked.replace("$namespace", ".*").replace("$release", ".*")
    found = prometheus.ask(asked)
    assert found, f"{where}: no data for {asked}"
    # A quantile of what a component never does is not a number.
    assert any(row["value"][1] != "NaN" for row in found), f"{where}: {found}"


def test_no_alert_fires_in_a_healthy_run(prometheus: Prometheus) -> None:
    firing = [alert["labels"] for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
    assert firing == []


def test_recording_rules_have_values(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    bad = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "ok"]
    assert bad == []
    assert prometheus.ask("connito:leaders:sum == 1")
