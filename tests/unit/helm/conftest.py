"""The chart, rendered by Helm itself over every values file that ships with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python.chart import Chart

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm/connito"
VALUES = {path.stem: path for path in sorted((CHART / "ci").glob("*.yaml"))}

Object = dict[str, Any]


def values_of(name: str) -> dict[str, Any]:
    """The values file helm/connito/ci/<name>.yaml."""
    loaded: dict[str, Any] = yaml.safe_load(VALUES[name].read_text())
    return loaded


def render(values: dict[str, Any], chart: Path = CHART, **options: Any) -> list[Object]:
    """Every object that `helm template` would print. Raises HelmError as Helm does."""
    with Chart.load(chart) as loaded:
        files = loaded.render(values, **{"name": "connito", "namespace": "ml"} | options)
    return [
        document
        for path, text in sorted(files.items())
        if not path.endswith("NOTES.txt")
        # Seven times as fast as the loader in Python, and most of what a rendering costs.
        for document in yaml.load_all(text, yaml.CSafeLoader)
        if document
    ]


def notes(values: dict[str, Any], **options: Any) -> str:
    """What Helm says at the end of an installation."""
    with Chart.load(CHART) as loaded:
        files = loaded.render(values, **{"name": "connito", "namespace": "ml"} | options)
    return next(text for path, text in files.items() if path.endswith("NOTES.txt"))


@cache
def rendered(name: str) -> tuple[Object, ...]:
    """`render` of a values file, once per process. Do not change what is returned."""
    return tuple(render(values_of(name)))


@pytest.fixture(params=sorted(VALUES))
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """The objects of each values file in turn."""
    return list(rendered(request.param))


def of_kind(objects: list[Object] | tuple[Object, ...], *kinds: str) -> list[Object]:
    """Those objects that have one of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def find(objects: list[Object] | tuple[Object, ...], kind: str, name: str) -> Object:
    """The one object of this kind and name."""
    (found,) = [item for item in of_kind(objects, kind) if item["metadata"]["name"] == name]
    return found


def pod_specs(objects: list[Object] | tuple[Object, ...]) -> dict[str, Object]:
    """`kind/name` -> pod spec, of everything that makes pods."""
    pick: dict[str, Callable[[Object], Object]] = {
        "Deployment": lambda item: item["spec"]["template"]["spec"],
        "StatefulSet": lambda item: item["spec"]["template"]["spec"],
        "Job": lambda item: item["spec"]["template"]["spec"],
        "Pod": lambda item: item["spec"],
    }
    return {
        f"{item['kind']}/{item['metadata']['name']}": pick[item["kind"]](item)
        for item in objects
        if item["kind"] in pick
    }


def environment(container: Object) -> dict[str, Any]:
    """Variable -> value, or the reference it comes from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
