"""What one of a release's pods is told to call, its network policies let it reach."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .conftest import Object, environment, of_kind, pod_specs, render, values_of
from .test_corpus import over, rendered

ADDRESS = re.compile(r"(?:^|//)([a-z0-9-]+)\.ml\.svc(?::(\d+))?")
CASES = (
    "plain", "everything", "bundled", "openshift with nats", "console that tries experts", "narrow policies", "one nats",
)  # fmt: skip


def chosen(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector has these labels."""
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def workloads(objects: tuple[Object, ...]) -> dict[str, tuple[dict[str, str], Object]]:
    """`kind/name` -> labels of the pods, their specification."""
    specs = pod_specs(objects)
    found = {}
    for item in objects:
        if spec := specs.get(f"{item['kind']}/{item['metadata']['name']}"):
            meta = item["metadata"] if item["kind"] == "Pod" else item["spec"]["template"]["metadata"]
            found[f"{item['kind']}/{item['metadata']['name']}"] = (meta["labels"], spec)
    return found


def ports(spec: Object) -> dict[str, int]:
    """Name of a port -> its number."""
    return {one["name"]: one["containerPort"] for part in spec["containers"] for one in part.get("ports", [])}


def lets(rules: list[Object], peers: str, other: dict[str, str], port: int, names: dict[str, int]) -> bool:
    """Whether one of these rules lets a port be reached, from or to pods with these labels."""
    for rule in rules:
        if rule.get("ports") and port not in {names.get(one["port"], one["port"]) for one in rule["ports"]}:
            continue
        if not rule.get(peers):
            return True
        if any(chosen(peer["podSelector"], other) for peer in rule[peers] if set(peer) == {"podSelector"}):
            return True
        # All namespaces, and so this one.
        if {"namespaceSelector": {}} in rule[peers]:
            return True
    return False


def blocked(objects: tuple[Object, ...]) -> tuple[list[str], int]:
    """Calls that a policy stops, and how many were looked at."""
    pods, policies = workloads(objects), [item["spec"] for item in of_kind(objects, "NetworkPolicy")]
    services = {item["metadata"]["name"]: item["spec"] for item in of_kind(objects, "Service")}
    found, looked = [], 0

    def passes(labels: dict[str, str], way: str, other: dict[str, str], port: int, names: dict[str, int]) -> bool:
        own = [one for one in policies if chosen(one["podSelector"], labels) and way in one["policyTypes"]]
        rules = [rule for one in own for rule in one.get(way.lower(), [])]
        return not own or lets(rules, {"Egress": "to", "Ingress": "from"}[way], other, port, names)

    for caller, (labels, spec) in pods.items():
        said = {
            match.groups()
            for name, value in environment(spec["containers"][0]).items()
            if isinstance(value, str) and name != "CONNITO_GRPC_ADVERTISE"
            for match in ADDRESS.finditer(value)
        }
        for host, number in said:
            (entry,) = [
                one for one in services[host]["ports"] if number is None or one["port"] == int(number)
            ]  # an address without a port means the only one
            for called, (theirs, target) in pods.items():
                if not services[host]["selector"].items() <= theirs.items():
                    continue
                names = ports(target)
                port = names.get(entry.get("targetPort", entry["port"]), entry.get("targetPort", entry["port"]))
                looked += 1
                for way, one, other in (("Egress", labels, theirs), ("Ingress", theirs, labels)):
                    if not passes(one, way, other, port, names):
                        found.append(f"{way} {caller} -> {called}:{port}")
    return found, looked


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_policy_stops_what_a_pod_is_told_to_call(name: str) -> None:
    found, _ = blocked(rendered(name))
    assert found == []


@pytest.mark.slow
def test_paths_to_nats_and_to_the_server_of_experts_are_among_those_looked_at() -> None:
    assert blocked(rendered("bundled"))[1] >= 7
    assert blocked(rendered("console that tries experts"))[1] >= 1
    less = tuple(
        item for item in rendered("console that tries experts") if "page-to-serve" not in item["metadata"]["name"]
    )
    assert blocked(less)[0] == ["Egress Deployment/connito-console -> Deployment/connito-serve:8080"]


@pytest.mark.slow
def test_the_console_has_an_address_and_a_key_of_the_server_of_experts() -> None:
    def console(values: dict[str, Any]) -> dict[str, Any]:
        objects = render(over(values_of("production"), values))
        return environment(pod_specs(objects)["Deployment/connito-console"]["containers"][0])

    own = {"serve": {"enabled": True, "keysSecret": "k", "existingClaim": "c"}}
    assert "CONNITO_CONSOLE_SERVE_URL" not in console(own)
    with_key = console(own | {"console": {"serve": {"secretName": "mine"}}})
    assert with_key["CONNITO_CONSOLE_SERVE_URL"] == "http://connito-serve.ml.svc/v1"
    assert with_key["CONNITO_CONSOLE_SERVE_KEY"] == {"secretKeyRef": {"name": "mine", "key": "key"}}
    elsewhere = console({"console": {"serve": {"url": "https://s.example.com/v1"}}})
    assert elsewhere["CONNITO_CONSOLE_SERVE_URL"] == "https://s.example.com/v1"
    assert "CONNITO_CONSOLE_SERVE_KEY" not in elsewhere
