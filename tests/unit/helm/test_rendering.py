"""What Helm renders is valid Kubernetes, and what it refuses says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from connito.platform.accounts import JETSTREAM
from helm_python.chart import lint
from helm_python.errors import HelmError

from .conftest import CHART, VALUES, Object, find, of_kind, pod_specs, render, rendered, values_of

# The oldest and the newest Kubernetes that the chart promises to work on.
VERSIONS = ("1.30", "1.37")
# Objects of operators: their schemas are not Kubernetes' own. test_objects.py and promtool look at them.
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}


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
    # The official NATS chart is fetched by `helm dependency build`; a working tree does not have it.
    errors = [
        m["error"]
        for m in report["messages"]
        if m["severity"] >= 2 and "missing these dependencies: nats" not in m["error"]
    ]
    assert errors == []


def test_names_are_unique(objects: list[Object]) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))


def test_every_service_is_there() -> None:
    expected = {"coordinator", "committer", "library", "selector", "aggregator", "validator", "streams", "test"}
    components = {
        item["metadata"]["labels"]["app.kubernetes.io/component"]
        for item in of_kind(rendered("platform"), "Deployment", "StatefulSet", "Job", "Pod")
    }
    assert components == expected


def test_trainer_mode_renders_trainers_alone() -> None:
    assert set(pod_specs(rendered("trainer"))) == {
        "StatefulSet/connito-trainer-gpu-0",
        "StatefulSet/connito-trainer-gpu-1",
    }


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
    ],
)
def test_the_schema_refuses(wrong: dict[str, Any]) -> None:
    values = values_of("platform")
    for key, value in wrong.items():
        values[key] = dict(values.get(key) or {}) | value if isinstance(value, dict) else value
    with pytest.raises(HelmError):
        render(values)


def test_the_nats_chart_is_installed_when_enabled_and_only_then(tmp_path: Path) -> None:
    """A stand-in has the place of the official chart, which no test downloads: what is tested is that it gets its values."""
    chart = tmp_path / "connito"
    shutil.copytree(CHART, chart)
    inner = chart / "charts/nats/templates"
    inner.mkdir(parents=True)
    (inner.parent / "Chart.yaml").write_text("apiVersion: v2\nname: nats\nversion: 1.2.0\n")
    (inner / "values.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: stand-in }\ndata:\n  values: {{ .Values | toJson | quote }}\n"
    )
    bundled = render(values_of("bundled-nats"), chart=chart)
    values = json.loads(find(bundled, "ConfigMap", "stand-in")["data"]["values"])
    assert values["config"]["cluster"] == {"enabled": True, "replicas": 3}
    assert values["config"]["jetstream"]["merge"] == JETSTREAM
    assert "stand-in" not in {item["metadata"]["name"] for item in render(values_of("platform"), chart=chart)}
