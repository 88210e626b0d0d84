"""What Helm renders is valid Kubernetes, and what it refuses says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from connito.platform.access import Access
from helm_python.chart import lint
from helm_python.errors import HelmError

from .conftest import CHART, VALUES, Object, find, of_kind, pod_specs, render, rendered, values_of

# The oldest and the newest Kubernetes that the chart promises to work on.
VERSIONS = ("1.30", "1.37")
# Objects of operators: their schemas are not Kubernetes' own. test_objects.py and promtool look at them.
CUSTOM = {"PodMonitor", "ScaledObject", "ServiceMonitor", "PrometheusRule"}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_in_strict_mode(objects: list[Object], version: str) -> None:
    checked = 0
    for item in objects:
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)
            checked += 1
    assert checked >= 8


def test_strict_mode_refuses_an_unknown_field() -> None:
    service = dict(of_kind(rendered("platform"), "Service")[0], surprise=1)
    with pytest.raises(kubernetes_validate.ValidationError, match="surprise"):
        kubernetes_validate.validate(service, "1.37", strict=True)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_helm_lint_finds_nothing(name: str) -> None:
    report = lint(CHART, values_of(name), strict=True)
    assert [message["error"] for message in report["messages"] if message["severity"] >= 2] == []


def test_names_are_unique(objects: list[Object]) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))


def test_nats_takes_its_configuration_with_the_accounts_that_are_exported(tmp_path: Path) -> None:
    Access(tmp_path / "out").export()
    values = values_of("bundled-nats")
    values["nats"] |= json.loads((tmp_path / "out/nats-values.yaml").read_text())["nats"]
    config = find(render(values), "ConfigMap", "connito-nats")["data"]["nats.conf"]
    config = config.replace("/data/", f"{tmp_path}/").replace("/var/run/nats", str(tmp_path))
    (tmp_path / "nats.conf").write_text(config)
    command = [str(Path(sys.executable).parent / "nats-server"), "-t", "-c", str(tmp_path / "nats.conf"), "--name", "a"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_service_is_there() -> None:
    expected = {"coordinator", "committer", "library", "selector", "aggregator", "validator", "streams", "test"} | {
        "rollout"
    }
    components = {
        item["metadata"]["labels"]["app.kubernetes.io/component"]
        for item in of_kind(rendered("platform"), "Deployment", "StatefulSet", "Job", "Pod")
    }
    assert components == expected


def test_trainer_mode_renders_trainers_alone() -> None:
    names = {name for name in pod_specs(rendered("trainer")) if "-rollout-" not in name}
    assert names == {"StatefulSet/connito-trainer-gpu-0", "StatefulSet/connito-trainer-gpu-1"}


def test_platform_and_trainers_fit_one_release() -> None:
    values = values_of("platform") | {"trainer": {"instances": [{"name": "house", "existingSecret": "house"}]}}
    assert "StatefulSet/connito-trainer-house" in pod_specs(render(values))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("image", "registry"), "image.registry is empty"),
        (("bus", "url"), "bus.url is empty"),
        (("store", "endpoint"), "store.endpoint is empty"),
        (("store", "existingSecret"), "store.existingSecret is empty"),
        (("coordinator", "existingSecret"), "coordinator.existingSecret is empty"),
        (("streams", "existingSecret"), "streams.existingSecret is empty"),
        (("roster", "existingConfigMap"), "roster.existingConfigMap is empty"),
    ],
)
def test_what_is_missing_is_named(path: tuple[str, str], message: str) -> None:
    values = values_of("platform")
    values[path[0]] = dict(values[path[0]]) | {path[1]: ""}
    with pytest.raises(HelmError, match=message):
        render(values)


def test_trainer_mode_without_instances_is_refused() -> None:
    values = values_of("trainer") | {"trainer": {"instances": []}}
    with pytest.raises(HelmError, match="nothing would be installed"):
        render(values)


def test_keda_without_a_monitoring_endpoint_is_refused() -> None:
    with pytest.raises(HelmError, match=r"bus\.monitoringEndpoint is empty"):
        render(values_of("platform") | {"keda": {"enabled": True}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"surprise": 1},
        {"coordinator": {"replcias": 3}},
        {"coordinator": {"cache": {"size": "1Gi"}}},
        {"mode": "everything"},
        {"store": {"endpoint": "minio:9000"}},
        {"bus": {"url": "http://nats:4222"}},
        {"trainer": {"instances": [{"name": "No_Name", "existingSecret": "x"}]}},
        {"trainer": {"instances": [{"name": "no-key"}]}},
        {"validator": {"variant": "rocm"}},
        {"selector": {"env": {"lower": "x"}}},
        {"mode": "trainer", "nats": {"enabled": True}},
        # What an API server reads as a number or a network, and refuses in the middle of an upgrade.
        {"coordinator": {"resources": {"limits": {"memory": "1 Gi"}}}},
        {"coordinator": {"resources": {"requests": {"cpu": "half"}}}},
        {"nats": {"resources": {"limits": {"memory": "1GB"}}}},
        {"podDisruptionBudget": {"enabled": True, "maxUnavailable": "150%"}},
        {"networkPolicy": {"api": {"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}}},
        {"networkPolicy": {"api": {"from": [{"ipBlock": {"cidr": "10.0.0.0"}}]}}},
    ],
)
def test_the_schema_refuses(wrong: dict[str, Any]) -> None:
    values = values_of("platform")
    for key, value in wrong.items():
        values[key] = dict(values.get(key) or {}) | value if isinstance(value, dict) else value
    with pytest.raises(HelmError):
        render(values)
