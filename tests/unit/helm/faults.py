"""What an API server refuses in an object, beyond the schema of its kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .conftest import Object

NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]")
LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]|")
UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def amount(text: object) -> float:
    """A quantity as a number."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert found, text
    return float(found[1]) * UNITS[found[2]]


def _twice(what: str, names: Iterable[object]) -> Iterator[str]:
    yield from (f"two {what} are called {name}" for name, count in Counter(names).items() if count > 1)


def _labels(where: str, labels: dict[str, Any]) -> Iterator[str]:
    for key, text in labels.items():
        if not KEY.fullmatch(key) or not isinstance(text, str) or not LABEL.fullmatch(text):
            yield f"{where} has the label {key}: {text!r}"


def _pod(spec: Object, claims: Iterable[str] = ()) -> Iterator[str]:
    volumes = {one["name"] for one in spec.get("volumes", [])} | set(claims)
    for key in ("priorityClassName", "runtimeClassName", "serviceAccountName"):
        if not NAME.fullmatch(spec.get(key, "x")) or len(spec.get(key, "")) > 253:
            yield f"its {key} is {spec[key]!r}"
    yield from _twice("volumes", (one["name"] for one in spec.get("volumes", [])))
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    yield from _twice("containers", (one["name"] for one in containers))
    yield from _labels("nodeSelector", spec.get("nodeSelector", {}))
    for one in containers:
        yield from _twice("variables", (entry["name"] for entry in one.get("env", [])))
        yield from _twice("mounts", (mount["mountPath"] for mount in one.get("volumeMounts", [])))
        for mount in one.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{one['name']} mounts {mount['name']}, which is no volume"
        if not str(one["image"]).strip() or " " in str(one["image"]):
            yield f"{one['name']} has the image {one['image']!r}"
        asked, most = (one.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
        for name in asked.keys() & most.keys():
            if amount(asked[name]) > amount(most[name]):
                yield f"{one['name']} asks for more {name} than it may have"


def faults(item: Object) -> Iterator[str]:
    """Sentences about what would be refused."""
    spec = item.get("spec", {})
    meta = item["metadata"]
    if not NAME.fullmatch(meta["name"]) or len(meta["name"]) > 253:
        yield f"{meta['name']!r} is no name"
    yield from _labels("metadata", meta.get("labels") or {})
    for key, text in (meta.get("annotations") or {}).items():
        if not isinstance(text, str) or not KEY.fullmatch(key):
            yield f"the annotation {key}: {text!r}"
    template = spec.get("template") if isinstance(spec, dict) else None
    if isinstance(template, dict) and "spec" in template:
        labels = template["metadata"].get("labels", {})
        yield from _labels("the pod", labels)
        yield from _pod(template["spec"], (one["metadata"]["name"] for one in spec.get("volumeClaimTemplates", [])))
        chosen = (spec.get("selector") or {}).get("matchLabels", {})
        if not chosen.items() <= labels.items():
            yield f"its selector {chosen} does not have its own pods {labels}"
    if item["kind"] == "Pod":
        yield from _pod(spec)
    if item["kind"] == "PodDisruptionBudget" and {"minAvailable", "maxUnavailable"} <= set(spec):
        yield "a budget says both"
    if item["kind"] == "HorizontalPodAutoscaler" and spec["minReplicas"] > spec["maxReplicas"]:
        yield "it scales to fewer than its least"
    if item["kind"] == "NetworkPolicy":
        for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
            if {} in (*rule.get("from", []), *rule.get("to", [])):
                yield "a peer says nothing"
    if item["kind"] == "PersistentVolumeClaim" and not NAME.fullmatch(spec.get("storageClassName", "x")):
        yield f"its class is {spec['storageClassName']!r}"
    if item["kind"] == "Service":
        yield from _twice("ports", (port["port"] for port in spec["ports"]))
