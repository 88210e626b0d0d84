"""Values files that a seed makes: what is valid is what Kubernetes takes, what is not is refused in words; releases stay apart.

The seeds below are what fits into a test's time; larger ranges were run by hand.
"""

from __future__ import annotations

import json
import random

import pytest
from helm_python.errors import HelmError

from .conftest import Object, environment, of_kind, pod_specs, render, values_of
from .faults import faults
from .generated import LEAVES, spoiled, valid, value
from .test_corpus import CUSTOM, validate

pytestmark = pytest.mark.slow

NOISE = ("nil pointer", "can't evaluate", "wrong type", "error calling", "cannot unmarshal", "interface {}")


def check(objects: list[Object]) -> None:
    """Nothing that a server would refuse."""
    found = [(item["kind"], item["metadata"]["name"], fault) for item in objects for fault in faults(item)]
    assert found == []
    for item in objects:
        if item["kind"] not in CUSTOM:
            validate(json.dumps(item, sort_keys=True), "1.34")


def apart(first: list[Object], second: list[Object]) -> None:
    """No object of one has the name of one of the other, and nothing of one takes hold of the other's pods."""

    def names(objects: list[Object]) -> set[tuple[str, str]]:
        # Whoever writes an object of his own chooses its name.
        return {(item["kind"], item["metadata"]["name"]) for item in objects if item["metadata"]["name"] != "mine"}

    assert not names(first) & names(second)
    pods = [
        item["spec"]["template"]["metadata"]["labels"] for item in of_kind(second, "Deployment", "StatefulSet", "Job")
    ]
    for item in of_kind(
        first, "Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "StatefulSet", "PodMonitor"
    ):
        chosen = item["spec"].get("podSelector", item["spec"].get("selector"))
        chosen = chosen.get("matchLabels", chosen)
        assert chosen
        assert not any(chosen.items() <= labels.items() for labels in pods), item["metadata"]["name"]


def test_two_releases_that_say_nothing_of_a_bucket_have_two() -> None:
    def buckets(release: str) -> set[object]:
        values = values_of("platform")
        values["store"].pop("bucket", None)
        variables = (environment(spec["containers"][0]) for spec in pod_specs(render(values, name=release)).values())
        return {found["CONNITO_S3_BUCKET"] for found in variables if "CONNITO_S3_BUCKET" in found}

    assert (buckets("connito"), buckets("two")) == ({"connito"}, {"two-connito"})


def test_an_upgrade_takes_no_other_bucket_than_the_one_that_a_release_has() -> None:
    """Charts before called it `connito` in every release: the objects of runs under way would seem to be lost."""
    values = values_of("platform")

    def buckets(release: str, named: str) -> set[object]:
        values["store"]["bucket"] = named
        objects = render(values, name=release, is_upgrade=True, is_install=False)
        variables = (environment(spec["containers"][0]) for spec in pod_specs(objects).values())
        return {found["CONNITO_S3_BUCKET"] for found in variables if "CONNITO_S3_BUCKET" in found}

    assert buckets("connito", "") == {"connito"}
    assert buckets("two", "connito") == {"connito"}
    with pytest.raises(HelmError, match=r"store\.bucket is not set: .*two-connito .*connito if by one of before"):
        buckets("two", "")


def test_every_value_of_the_schema_is_varied() -> None:
    chance = random.Random(0)
    assert len([value(path, part, chance) for path, part in LEAVES]) > 400


@pytest.mark.parametrize("part", range(8))
def test_what_the_schema_takes_is_what_kubernetes_takes(part: int) -> None:
    for seed in range(part * 8, part * 8 + 8, 2):
        one, two = render(valid(seed), name="one"), render(valid(seed + 1), name="two")
        check(one)
        check(two)
        apart(one, two)


@pytest.mark.parametrize("part", range(4))
def test_a_spoiled_value_is_refused_in_words_or_does_no_harm(part: int) -> None:
    for seed in range(part * 16, part * 16 + 16):
        values, path = spoiled(seed)
        try:
            objects = render(values)
        except HelmError as error:
            said = str(error)
            assert any(name in said for name in path[-2:]), (path, said)
            assert not [noise for noise in NOISE if noise in said], (path, said)
        else:
            check(objects)


def test_the_checks_see_what_a_server_refuses() -> None:
    objects = render(values_of("platform"))
    (item,) = of_kind(objects, "Deployment")[:1]
    spec = item["spec"]["template"]["spec"]
    spec["containers"][0]["env"] *= 2
    spec["containers"][0]["volumeMounts"].append({"name": "nowhere", "mountPath": "/x"})
    item["spec"]["selector"]["matchLabels"]["x"] = "y"
    said = " ".join(faults(item))
    assert "two variables are called" in said
    assert "mounts nowhere, which is no volume" in said
    assert "does not have its own pods" in said
