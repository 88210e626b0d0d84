"""What the rendered objects promise: locked-down pods, probes that do not depend on the bus, closed networks, scaling."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from connito.bus.streams import DURABLES
from connito.platform.accounts import JETSTREAM, SERVER

from .conftest import CHART, ROOT, Object, environment, find, of_kind, pod_specs, render, rendered, values_of

RELEASE = {"app.kubernetes.io/name": "connito", "app.kubernetes.io/instance": "connito"}


def test_pods_are_locked_down(objects: list[Object]) -> None:
    for name, spec in pod_specs(objects).items():
        security = spec["securityContext"]
        assert security["runAsNonRoot"], name
        assert security["runAsUser"] == security["fsGroup"] == 10001, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        # Kubernetes would otherwise set variables that look like our settings.
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "privileged": False,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["limits"]["memory"], name


def test_secrets_exist_already(objects: list[Object]) -> None:
    assert of_kind(objects, "Secret") == []
    for name, spec in pod_specs(objects).items():
        if "-rollout-" in name or name.endswith("-nats"):
            continue
        (key,) = [volume["secret"] for volume in spec["volumes"] if "secret" in volume]
        assert key["secretName"], name
        assert key["defaultMode"] == 0o440, name


def test_liveness_asks_the_process_and_readiness_the_bus(objects: list[Object]) -> None:
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        container, *_ = item["spec"]["template"]["spec"]["containers"]
        if container["name"] == "nats":
            continue
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
        assert container["startupProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


def test_bucket_credentials_go_to_services_and_never_to_miners() -> None:
    values = values_of("platform") | {"trainer": {"instances": [{"name": "house", "existingSecret": "house"}]}}
    for name, spec in pod_specs(render(values)).items():
        variables = environment(spec["containers"][0])
        has = "CONNITO_S3_SECRET_KEY" in variables
        assert has == (not any(part in name for part in ("trainer", "streams", "coordinator", "rollout"))), name
        if has:
            assert variables["CONNITO_S3_SECRET_KEY"] == {"secretKeyRef": {"name": "connito-s3", "key": "secret-key"}}


def test_a_component_may_have_credentials_of_its_own() -> None:
    values = values_of("platform")
    values["store"] = values["store"] | {"existingSecrets": {"validator": "s3-validator", "committer": "s3-committer"}}
    found = {}
    for name, spec in pod_specs(render(values)).items():
        variables = environment(spec["containers"][0])
        if "CONNITO_S3_SECRET_KEY" in variables:
            found[name] = variables["CONNITO_S3_SECRET_KEY"]["secretKeyRef"]["name"]
    validators = {secret for name, secret in found.items() if "validator" in name}
    committers = {secret for name, secret in found.items() if "committer" in name}
    assert (validators, committers) == ({"s3-validator"}, {"s3-committer"})
    assert "connito-s3" in found.values(), "and the others have the common one"


def test_each_key_runs_once() -> None:
    objects = rendered("production")
    for item in of_kind(objects, "StatefulSet"):
        assert item["spec"]["replicas"] == 1
    secrets = [
        volume["secret"]["secretName"]
        for item in of_kind(objects, "StatefulSet")
        for volume in item["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    ]
    assert len(secrets) == len(set(secrets)) == 3


def test_the_work_of_a_miner_outlives_the_release() -> None:
    objects = rendered("trainer")
    trainer = find(objects, "StatefulSet", "connito-trainer-gpu-0")["spec"]
    kept = find(objects, "PersistentVolumeClaim", "connito-trainer-gpu-0-work")["metadata"]["annotations"]
    assert kept == {"helm.sh/resource-policy": "keep"}
    claims = {volume["name"] for volume in trainer["template"]["spec"]["volumes"] if "persistentVolumeClaim" in volume}
    assert claims == {"cache", "work"}
    mounts = {mount["mountPath"] for mount in trainer["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert {"/var/cache/connito", "/var/lib/connito", "/tmp"} <= mounts


def test_everything_is_denied_unless_a_policy_allows_it(objects: list[Object]) -> None:
    deny = find(objects, "NetworkPolicy", "connito-default-deny")["spec"]
    assert deny == {"podSelector": {"matchLabels": RELEASE}, "policyTypes": ["Ingress", "Egress"]}
    for item in of_kind(objects, "Deployment", "StatefulSet", "Job"):
        labels = item["spec"]["template"]["metadata"]["labels"]
        assert RELEASE.items() <= labels.items(), item["metadata"]["name"]
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
            assert rule["ports"], policy["metadata"]["name"]


def _egress_ports(objects: Any, name: str) -> set[int]:
    rules = find(objects, "NetworkPolicy", name)["spec"]["egress"]
    return {port["port"] for rule in rules for port in rule["ports"]}


def test_policies_follow_the_addresses() -> None:
    assert _egress_ports(rendered("platform"), "connito-dns-and-bus") == {53, 4222}
    assert _egress_ports(rendered("platform"), "connito-store") == {8333}
    assert _egress_ports(rendered("production"), "connito-store") == {9000, 443}
    assert _egress_ports(rendered("bundled-nats"), "connito-store") == {443}
    assert _egress_ports(rendered("trainer"), "connito-api-clients") == {9090}
    bus = find(rendered("production"), "NetworkPolicy", "connito-dns-and-bus")["spec"]["egress"][1]
    assert bus["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "messaging"}}}]


def test_services_reach_pods(objects: list[Object]) -> None:
    workloads = [item["spec"]["template"] for item in of_kind(objects, "Deployment", "StatefulSet")]
    services = of_kind(objects, "Service")
    for service in services:
        selector = service["spec"]["selector"]
        chosen = [pod for pod in workloads if selector.items() <= pod["metadata"]["labels"].items()]
        assert len(chosen) == 1, service["metadata"]["name"]
        ports = {port["name"] for container in chosen[0]["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for item in of_kind(objects, "StatefulSet"):
        assert item["spec"]["serviceName"] in {service["metadata"]["name"] for service in services}


def test_apis_say_where_they_are_reached() -> None:
    def advertised(values: str, name: str) -> str:
        spec = find(rendered(values), "Deployment", name)["spec"]["template"]["spec"]
        return str(environment(spec["containers"][0])["CONNITO_GRPC_ADVERTISE"])

    assert advertised("platform", "connito-committer") == "connito-committer.ml.svc:9090"
    assert advertised("production", "connito-committer") == "uploads.example.com:9090"


def test_metrics_stay_inside_when_the_api_is_public() -> None:
    public = find(rendered("production"), "Service", "connito-coordinator")["spec"]
    assert public["type"] == "LoadBalancer"
    assert [port["name"] for port in public["ports"]] == ["grpc"]
    inside = find(rendered("production"), "Service", "connito-coordinator-http")["spec"]
    assert inside["clusterIP"] == "None"


@pytest.mark.parametrize("name", ["platform", "production", "bundled-nats"])
def test_disruption_budgets_cover_the_pods(name: str) -> None:
    objects = rendered(name)
    budgets = [item["spec"]["selector"]["matchLabels"] for item in of_kind(objects, "PodDisruptionBudget")]
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        labels = item["spec"]["template"]["metadata"]["labels"]
        assert sum(budget.items() <= labels.items() for budget in budgets) == 1, item["metadata"]["name"]


def test_keda_scales_on_consumers_that_exist() -> None:
    objects = rendered("production")
    scaled = of_kind(objects, "ScaledObject")
    assert {item["metadata"]["name"] for item in scaled} == {"connito-library", "connito-selector"}
    for item in scaled:
        target = find(objects, "Deployment", item["spec"]["scaleTargetRef"]["name"])
        assert "replicas" not in target["spec"]
        (trigger,) = item["spec"]["triggers"]
        metadata = trigger["metadata"]
        assert trigger["type"] == "nats-jetstream"
        assert metadata["stream"] == DURABLES[metadata["consumer"]].stream
        assert all(isinstance(value, str) for value in metadata.values())
    assert trigger["metadata"]["natsServerMonitoringEndpoint"] == "nats-headless.messaging.svc:8222"


def test_bundled_nats_is_what_the_platform_needs() -> None:
    objects = rendered("bundled-nats")
    spec = find(objects, "Deployment", "connito-coordinator")["spec"]["template"]["spec"]
    assert environment(spec["containers"][0])["CONNITO_NATS_URL"] == "nats://connito-nats.ml.svc:4222"
    config = json.loads(find(objects, "ConfigMap", "connito-nats")["data"]["nats.conf"])
    assert JETSTREAM.items() <= config["jetstream"].items()
    assert SERVER.items() <= config.items()
    assert config["operator"]
    assert len(config["cluster"]["routes"]) == find(objects, "StatefulSet", "connito-nats")["spec"]["replicas"] == 3
    policy = find(objects, "NetworkPolicy", "connito-nats")["spec"]
    routes, *_ = policy["ingress"]
    assert [port["port"] for port in routes["ports"]] == [6222]
    assert routes["from"] == [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/instance": "connito", "connito-workload": "nats"}}}
    ]


def test_the_streams_job_is_new_when_its_work_is() -> None:
    def job(**bus: Any) -> str:
        values = values_of("platform")
        values["bus"] = values["bus"] | bus
        return str(of_kind(render(values), "Job")[0]["metadata"]["name"])

    assert job() == job()
    assert job() != job(streamReplicas=3)


def test_the_prometheus_operator_gets_the_same_rules() -> None:
    rule = find(rendered("production"), "PrometheusRule", "connito")
    pages = [
        rule["annotations"].pop("runbook_url")
        for group in rule["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert rule["spec"] == yaml.safe_load((CHART / "files/rules.yaml").read_text())
    anchors = set(re.findall(r"^#+ (\w+)$", (ROOT / "docs/reference/alerts.md").read_text().lower(), re.M))
    assert {page.partition("#")[0] for page in pages} == {"https://docs.example.com/reference/alerts.html"}
    assert {page.partition("#")[2] for page in pages} <= anchors
    assert rule["metadata"]["labels"]["release"] == "prometheus"


@pytest.mark.parametrize(("console", "page"), [
    ({"oidc": {"client": "connito", "url": "https://one.example.com/", "secretName": "sso"}}, "https://one.example.com"),
    ({"ingress": {"enabled": True, "hosts": ["two.example.com"], "tlsSecret": "two"}}, "https://two.example.com"),
    ({"ingress": {"enabled": True, "hosts": ["three.internal"]}}, "http://three.internal"),
    ({"ingress": {"enabled": True, "hosts": ["four.example.com"], "path": "/connito"}}, ""),
    ({"route": {"enabled": True, "parentRefs": [{"name": "out"}], "hostnames": ["five.example.com"]}}, "https://five.example.com"),
    ({"enabled": False, "ingress": {"enabled": True, "hosts": ["six.example.com"]}}, ""),
])  # fmt: skip
def test_an_alert_links_to_the_console_that_explains_it(console: dict[str, Any], page: str) -> None:
    values = values_of("platform") | {
        "console": {"enabled": True, "existingSecret": "reader", "tokenSecret": "token"} | console,
        "oidc": {"issuer": "https://login.example.com", "audience": "connito"},
        "monitoring": {"prometheusRule": {"enabled": True}},
    }
    groups = find(render(values), "PrometheusRule", "connito")["spec"]["groups"]
    links = {
        rule["annotations"].get("runbook_url", "") for group in groups for rule in group["rules"] if "alert" in rule
    }
    text = (ROOT / "services/console/static/alerts.html").read_text()
    for link in links:
        address, _, place = link.partition("#")
        assert address == (f"{page}/static/alerts.html" if page else "")
        assert not place or f'id="{place}"' in text


def test_a_miner_gets_a_miner_s_alerts_and_dashboard() -> None:
    values = values_of("trainer")
    values["monitoring"] = values["monitoring"] | {"prometheusRule": {"enabled": True}}
    objects = render(values)
    groups = [group["name"] for group in find(objects, "PrometheusRule", "connito")["spec"]["groups"]]
    assert groups == ["connito.everywhere"]
    # Nobody said where the page is served, and a link that leads nowhere is worse than none.
    assert "runbook_url" not in str(find(objects, "PrometheusRule", "connito"))
    names = {item["metadata"]["name"] for item in of_kind(objects, "ConfigMap")}
    assert names == {"connito-dashboard-miner", "connito-rollout"}


def test_gpus_go_to_the_cuda_image() -> None:
    (container,) = find(rendered("trainer"), "StatefulSet", "connito-trainer-gpu-1")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["image"] == "registry.example.com/connito/connito-trainer-cuda:0.1.0"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert environment(container)["CONNITO_RUN"] == "medical-7"
