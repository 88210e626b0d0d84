"""Values files that nobody wrote: what the schema lets through, over one of the files that ship with the chart."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from .conftest import CHART, values_of

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
BASES = ("platform", "production", "bundled-nats", "trainer")
DIGEST = f"sha256:{'5' * 64}"
# For a pattern, the first of these that it takes; tests fail where there is none.
TEXTS = (
    "250m", "7Gi", "a-name", "my-bucket-2", "https://x.example.com", "https://x.example.com/v1", "nats://a.example.com:4222,tls://b:4223",
    "http://s.example.com:9000", "x.example.com:8222", "48h", "15s", DIGEST, "25%", "v1.2",
)  # fmt: skip
PEER = {"namespaceSelector": {"matchLabels": {"team": "ml"}}}
# What Kubernetes' own types may hold, by the name that values have for them.
WHOLE: dict[str, tuple[Any, ...]] = {
    "nodeSelector": ({"pool": "ml"}, {"kubernetes.io/arch": "amd64", "gpu": "true"}),
    "tolerations": ([{"operator": "Exists"}], [{"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"}]),
    "affinity": (
        {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}]}}},
    ),
    "topologySpreadConstraints": (
        [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
          "labelSelector": {"matchLabels": {"a": "b"}}}],
    ),
    "podLabels": ({"team": "ml"}, {"a.b/c": "", "x": "Y_1.z"}),
    "labels": ({"team": "ml"},),
    "commonLabels": ({"cost-centre": "42"},),
    "podAnnotations": ({"sidecar.istio.io/inject": "false"}, {"text": "ä – 'b' \"c\"\nd: {{ e }}"}),
    "annotations": ({"example.com/x": "y: [z"},),
    "commonAnnotations": ({"owner": "platform"},),
    "env": ({"A": 1, "B": True, "C": "x y"}, {"CONNITO_LOG_LEVEL": "debug"}),
    "extraEnv": ([{"name": "P", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}], [{"name": "Q", "value": "1"}]),
    "envFrom": ([{"configMapRef": {"name": "more"}}],),
    "extraVolumes": ([{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}],),
    "initContainers": ([{"name": "first", "image": "busybox:1", "command": ["true"]}],),
    "extraContainers": ([{"name": "proxy", "image": "envoy:1"}],),
    "resources": (
        {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"memory": "64Gi"}},
        {"requests": {"cpu": 0.25, "memory": "1Gi"}, "limits": {"memory": "32Gi", "cpu": 16}},
    ),
    "from": ([PEER], [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}, {"podSelector": {}}]),
    "to": ([PEER], [{"ipBlock": {"cidr": "10.0.0.1/32"}}]),
    "parentRefs": ([{"name": "gw", "namespace": "infra", "sectionName": "https"}],),
    "behavior": ({"scaleDown": {"stabilizationWindowSeconds": 600}},),
    "podSecurityContext": ({"runAsUser": 2000, "fsGroup": 2000}, {"supplementalGroups": [4, 5]}),
    "config": ({"write_deadline": "30s"},),
    "hosts": (["a.example.com"], ["a.example.com", "b.example.com"]),
    "hostnames": (["a.example.com"],),
    "dnsNames": (["a.example.com"],),
    "pullSecrets": (["a", "b"],),
    "proxies": (["10.1.0.0/16"],),
    "loadBalancerSourceRanges": (["10.0.0.0/8"],),
    "ipFamilies": (["IPv4"],),
    "ports": ([53], [53, 5353]),
    "digests": ({"coordinator": DIGEST},),
    "existingSecrets": ({"validator": "s3-v"},),
    "path": ("/", "/x"),
    "instances": ([{"name": "a", "existingSecret": "key-a"}], [{"name": n, "existingSecret": f"key-{n}"} for n in "bcd"]),
    "existingClaims": ({},),
    "patches": ([{"kind": "Service", "merge": {"metadata": {"annotations": {"a": "b"}}}}],),
    "extraObjects": ([{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine"}, "data": {"a": "b"}}],),
    "duration": ("48h",),
    "global": ({"region": "eu"},),
}  # fmt: skip
# What belongs to other values, which a single change cannot know; the hand-written corpus has them.
LEFT = {
    "mode", "fullnameOverride", "nameOverride", "auth", "variant", "stopped", "extraVolumeMounts", "enabled", "grpc",
    "streamReplicas", "tlsSecret", "minReplicas", "maxReplicas", "maxUnavailable", "minAvailable", "nodePort", "userHeader",
    "externalTrafficPolicy", "type", "loadBalancerClass", "ipFamilyPolicy", "ipFamilies", "healthCheckNodePort",
    "loadBalancerSourceRanges", "issuer", "client", "audience", "replicas",
}  # fmt: skip


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema without its reference."""
    if "$ref" in node:
        return resolved(SCHEMA["definitions"][node["$ref"].rpartition("/")[2]])
    return node


def leaves(node: dict[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(path, schema) of each value that is set as one."""
    for name, child in node.get("properties", {}).items():
        part = resolved(child)
        if name in LEFT:
            continue
        if name in WHOLE or "properties" not in part:
            yield (*above, name), part
        else:
            yield from leaves(part, *above, name)


LEAVES = [*leaves(SCHEMA)]


def value(path: tuple[str, ...], part: dict[str, Any], chance: random.Random) -> Any:
    """Something that the schema takes at this place. Raises `LookupError` where nobody has said what."""
    if path[-1] in WHOLE:
        return deepcopy(chance.choice(WHOLE[path[-1]]))
    if "enum" in part:
        return chance.choice(part["enum"])
    kind = part.get("type")
    if kind == "boolean":
        return chance.random() < 0.5
    if kind in ("integer", "number"):
        low = part.get("minimum", 0)
        return chance.choice([low, low + 1, min(low + 3, part.get("maximum", low + 3))])
    if kind == "string":
        fits = [text for text in TEXTS if re.search(part.get("pattern", ""), text)]
        if "pattern" in part:
            return chance.choice(fits)
        return chance.choice(["a-name", "x1", "another-name-of-some-length"])
    raise LookupError(".".join(path))


def put(values: dict[str, Any], path: tuple[str, ...], new: Any) -> None:
    """Set one value, making the sections above it."""
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = new


def valid(seed: int) -> dict[str, Any]:
    """A values file with up to nine changes that Kubernetes takes."""
    chance = random.Random(seed)
    values = values_of(chance.choice(BASES))
    for path, part in chance.sample(LEAVES, chance.randint(1, 9)):
        put(values, path, value(path, part, chance))
    return values


SPOILED: tuple[Any, ...] = (
    None,
    [],
    {},
    -1,
    1e9,
    "",
    "a b",
    "ä",
    ["x"],
    {"x": 1},
    True,
    [{}],
    "x" * 300,
    0.5,
    "{{ .Values }}",
    "\n",
)


def spoiled(seed: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A values file in which one value is something that nobody means, and where."""
    chance = random.Random(seed)
    values = values_of(chance.choice(BASES))
    path, _ = chance.choice(LEAVES)
    put(values, path, deepcopy(chance.choice(SPOILED)))
    return values, path
