"""Values that nobody means: each is refused in words that name the place, or does what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helm_python.errors import HelmError

from .conftest import CHART, environment, pod_specs, render, values_of
from .test_corpus import over, validate

pytestmark = pytest.mark.slow

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def sections(node: dict[str, Any], schema: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    """The path of each section that the chart's own values have and its templates read in."""
    for name, value in node.items():
        part = schema.get("properties", {}).get(name, {})
        if isinstance(value, dict) and part.get("properties"):
            yield (*above, name)
            yield from sections(value, part, *above, name)


@pytest.mark.parametrize("path", [*sections(DEFAULTS, SCHEMA)], ids=".".join)
def test_a_section_that_is_taken_away_is_missed_by_its_name(path: tuple[str, ...]) -> None:
    values: Any = None
    for name in reversed(path):
        values = {name: values}
    with pytest.raises(HelmError, match=f"missing propert.*'{path[-1]}'"):
        render(over(values_of("platform"), values))


REFUSED = {
    "fullnameOverride: Connito_Prod": "fullnameOverride",
    "nameOverride: über": "nameOverride",
    "commonLabels: { team: équipe }": "commonLabels/team",
    "commonLabels: { team: yes }": "commonLabels/team",
    f"commonLabels: {{ team: {'a' * 64} }}": "commonLabels/team",
    "coordinator: { replicas: '2' }": "coordinator/replicas",
    "coordinator: { replicas: -1 }": "coordinator/replicas",
    "image: { tag: 0.10 }": "image/tag",
    "library: { env: { A: null } }": "library/env/A",
    "library: { extraEnv: null }": "library/extraEnv",
    "pods: { nodeSelector: { gpu: on } }": "pods/nodeSelector/gpu",
    "pods: { tolerations: { key: a } }": "pods/tolerations",
    "bus: { url: ' nats://a:4222' }": "bus/url",
    "bus: { url: 4222 }": "bus/url",
    "validator: { instances: [{ name: 1, existingSecret: a }] }": "instances/0/name",
    "validator: { instances: [{ name: A_b, existingSecret: a }] }": "instances/0/name",
    "validator: { instances: [{ name: a, existingSecret: a }, { name: a, existingSecret: b }] }": "two are called a",
    "validator: { instances: [{ name: a, existingSecret: s }, { name: b, existingSecret: s }] }": "one key runs once",
    "validator: { instances: [null] }": "instances/0",
    "patches: [{ kind: Deployment, merge: null }]": "patches/0/merge",
    "patches: [{ kind: Deployment, name: nobody, merge: {} }]": "patches.0. fits nothing",
    "extraObjects: [just words]": "is no object",
    "extraObjects: [null]": "extraObjects/0",
    "extraObjects: [{ a: b }]": "is no object",
    "oidc: { issuer: 'http://login.example.com', audience: connito }": "oidc/issuer",
    "oidc: { issuer: 'https://login.example.com' }": "oidc.audience is empty",
    "console: { enabled: true, existingSecret: c, tokenSecret: 123 }": "console/tokenSecret",
    "selector: { variant: cuda }": "selector.resources.limits asks for no GPU",
    "aggregator: { variant: cuda, resources: { limits: { memory: 8Gi } } }": "aggregator.variant is cuda",
    "validator: { variant: cuda, instances: [{ name: a, existingSecret: s }] }": "validator.instances: a.resources.limits",
    "serve: { enabled: true, keysSecret: k, existingClaim: c, variant: cuda }": "serve.resources.limits asks for no GPU",
}
TAKEN = (
    "validator: { instances: [] }",
    "commonAnnotations: { note: '数据 – “x” {{ .Values }} $(rm)' }",
    "library: { env: { NOTE: \"naïve: 数据 'x' \\\"y\\\"\\nline {{ x }}\", FLAG: yes, N: 012, E: 1e3 } }",
    f"fullnameOverride: {'a' * 200}",
    "committer: { resources: { requests: { cpu: 0.5, memory: 512000000 } }, env: { CONNITO_CACHE_MAX_BYTES: 17179869184 } }",
    "bus: { url: 'nats://[fd00::1]:4222' }\nstore: { endpoint: 'http://[fd00::2]:8333' }",
    "validator: { variant: cuda, instances: [{ name: a, existingSecret: s, resources: { limits: { g.io/mig-1g.5gb: 1 } } }] }",
    "fullnameOverride: ''\nextraObjects: []\npatches: []\npods: { tolerations: [] }",
)  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_at_its_place(text: str) -> None:
    with pytest.raises(HelmError) as refused:
        render(over(values_of("platform"), yaml.safe_load(text)))
    assert re.search(REFUSED[text], str(refused.value)), refused.value
    assert "nil pointer" not in str(refused.value)


@pytest.mark.parametrize("text", TAKEN)
def test_what_is_odd_and_right_is_what_kubernetes_takes(text: str) -> None:
    for item in render(over(values_of("platform"), yaml.safe_load(text))):
        assert len(item["metadata"]["name"]) <= 63 or item["kind"] in {"ConfigMap", "NetworkPolicy"}
        validate(json.dumps(item), "1.34")


def test_numbers_in_variables_stay_what_was_written() -> None:
    given = {"A": 17179869184, "B": 0.25, "C": 0, "D": -3, "E": True, "N": "012"}
    objects = render(over(values_of("platform"), {"committer": {"env": given}}))
    variables = environment(pod_specs(objects)["Deployment/connito-committer"]["containers"][0])
    assert {name: variables[name] for name in given} == {
        "A": "17179869184", "B": "0.25", "C": "0", "D": "-3", "E": "true", "N": "012",
    }  # fmt: skip
