"""What people set renders, is what Kubernetes takes, fits its names, and can be upgraded to and back.

No API server is to be had from package registries: which fields it refuses to change is written down here, from the API
conventions, and every pair of renderings is compared by it.
"""

from __future__ import annotations

import json
import re
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python.errors import HelmError

from .conftest import CHART, Object, of_kind, pod_specs, render, values_of

pytestmark = pytest.mark.slow

CORPUS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "corpus.yaml").read_text())
VERSIONS = ("1.30", "1.34", "1.37")
# Kinds of operators, which Kubernetes' own schema does not know.
CUSTOM = {"Certificate", "ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule", "HTTPRoute", "GRPCRoute"}
LONG = "a-release-whose-name-is-as-long-as-helm-lets-it-be-ok"
LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]|")


def over(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`values` with `more` put over them, as a second `-f` does."""
    result = deepcopy(values)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = over(result[key], value) if both else value
    return result


@cache
def rendered(name: str, release: str = "connito") -> tuple[Object, ...]:
    """The objects of one case. Do not change what is returned."""
    case = CORPUS[name]
    return tuple(render(over(values_of(case["base"]), case["values"]), name=release))


@cache
def validate(item: str, version: str) -> None:
    """Check an object, which most cases have in common, once."""
    kubernetes_validate.validate(json.loads(item), version, strict=True)


def frozen(item: Object) -> Any:
    """What of an object an API server refuses to change."""
    spec = item.get("spec", {})
    match item["kind"]:
        case "Deployment":
            return spec["selector"]
        case "StatefulSet":
            may = {"replicas", "template", "updateStrategy", "persistentVolumeClaimRetentionPolicy", "minReadySeconds"}
            return {key: value for key, value in spec.items() if key not in may}
        case "Job":
            return {key: spec.get(key) for key in ("template", "selector", "completions", "completionMode")}
        case "PersistentVolumeClaim":
            return {key: value for key, value in spec.items() if key != "resources"}
        case "Service":
            return spec.get("clusterIP") == "None", (spec.get("ipFamilies") or ["IPv4"])[0]
        case "RoleBinding":
            return item["roleRef"]
    return None


def size(item: Object) -> int:
    """Bytes that a claim asks for."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)?", item["spec"]["resources"]["requests"]["storage"]).groups()  # type: ignore[union-attr]
    return int(number) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}[unit]


def refused(old: tuple[Object, ...], new: tuple[Object, ...]) -> list[str]:
    """The kinds of objects that this upgrade would fail on."""
    before = {(item["kind"], item["metadata"]["name"]): item for item in old}
    found = []
    for item in new:
        same = before.get((item["kind"], item["metadata"]["name"]))
        if same is None:
            continue
        smaller = item["kind"] == "PersistentVolumeClaim" and size(item) < size(same)
        if frozen(item) != frozen(same) or smaller:
            found.append(item["kind"])
    return found


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 60


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_a_case_is_valid_restricted_short_and_can_be_upgraded_to(name: str) -> None:
    """One test a case: Helm takes most of the time, and renderings are shared within a process only."""
    objects = rendered(name)
    check_valid_in_strict_mode_at_three_versions(objects)
    check_every_own_container_is_restricted(objects)
    for one in (objects, rendered(name, LONG)):
        check_names_and_labels_are_short_enough(one)
    check_an_upgrade_and_back_change_nothing_that_cannot_change(name)


def check_valid_in_strict_mode_at_three_versions(objects: tuple[Object, ...]) -> None:
    known = [item for item in objects if item["kind"] not in CUSTOM]
    assert len(known) >= 8
    for version in VERSIONS:
        for item in known:
            validate(json.dumps(item), version)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))


def check_names_and_labels_are_short_enough(objects: tuple[Object, ...]) -> None:
    for item in objects:
        limit = {"StatefulSet": 52, "Job": 57, "Service": 63}.get(item["kind"], 253)
        assert len(item["metadata"]["name"]) <= limit, item["metadata"]["name"]
        template = item.get("spec", {}).get("template", {}) if isinstance(item.get("spec"), dict) else {}
        for labels in (item["metadata"].get("labels", {}), template.get("metadata", {}).get("labels", {})):
            for key, value in labels.items():
                assert LABEL.fullmatch(value), (item["metadata"]["name"], key, value)


def check_an_upgrade_and_back_change_nothing_that_cannot_change(name: str) -> None:
    case = CORPUS[name]
    plain = rendered({"platform": "plain", "production": "everything", "trainer": "miner"}.get(case["base"], "bundled"))
    assert set(refused(plain, rendered(name))) == set(case.get("immutable", []))
    if not case.get("grows"):
        assert set(refused(rendered(name), plain)) == set(case.get("immutable", []))


@pytest.mark.parametrize("on", ["platform", "production", "trainer", "bundled-nats"])
def test_a_new_version_of_the_chart_is_taken_with_the_same_values(on: str, tmp_path: Path) -> None:
    newer = tmp_path / "connito"
    shutil.copytree(CHART, newer)
    said = (newer / "Chart.yaml").read_text().replace("0.1.0", "0.1.1")
    (newer / "Chart.yaml").write_text(said)
    old, new = tuple(render(values_of(on))), tuple(render(values_of(on), chart=newer))
    assert new != old
    assert refused(old, new) == []


def test_the_comparison_sees_a_change_that_a_server_refuses() -> None:
    old = rendered("plain")
    new = deepcopy(old)
    for item in new:
        if item["kind"] == "Job":
            item["spec"]["template"]["spec"]["priorityClassName"] = "other"
        if item["kind"] == "Deployment":
            item["spec"]["selector"]["matchLabels"]["x"] = "y"
    assert set(refused(old, new)) == {"Job", "Deployment"}


@pytest.mark.parametrize("name", ["plain", "everything", "bundled", "miner"])
def test_two_releases_live_side_by_side(name: str) -> None:
    first, second = rendered(name, "one"), rendered(name, "two")
    assert not {(i["kind"], i["metadata"]["name"]) for i in first} & {
        (i["kind"], i["metadata"]["name"]) for i in second
    }
    pods = [
        item["spec"]["template"]["metadata"]["labels"] for item in of_kind(second, "Deployment", "StatefulSet", "Job")
    ]
    for item in of_kind(first, "Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "StatefulSet"):
        spec = item["spec"]
        chosen = spec.get("podSelector", spec.get("selector"))
        chosen = chosen.get("matchLabels", chosen)
        assert not any(chosen.items() <= labels.items() for labels in pods), item["metadata"]["name"]


def test_long_names_that_begin_alike_stay_two() -> None:
    names = [f"a-platform-for-the-department-of-linguistics-{letter}" for letter in "ab"]
    first, second = ({i["metadata"]["name"] for i in rendered("plain", name)} for name in names)
    assert not first & second


@pytest.mark.parametrize("name", ["openshift", "openshift with nats"])
def test_openshift_chooses_the_user(name: str) -> None:
    for spec in pod_specs(rendered(name)).values():
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(spec["securityContext"])
        assert spec["securityContext"]["runAsNonRoot"] is True
    (policy,) = [i for i in of_kind(rendered(name), "NetworkPolicy") if i["metadata"]["name"] == "connito-dns-and-bus"]
    assert {53, 5353} <= {port["port"] for port in policy["spec"]["egress"][0]["ports"]}


def patch(kind: str, merge: dict[str, Any]) -> dict[str, Any]:
    """Values with one merge patch on every object of a kind."""
    return {"patches": [{"kind": kind, "merge": merge}]}


@pytest.mark.parametrize("base", ["platform", "production", "bundled-nats", "trainer"])
def test_a_release_that_is_stopped_has_no_pod_and_starts_again(base: str) -> None:
    plain = values_of(base)
    there, stopped = tuple(render(plain)), tuple(render(over(plain, {"stopped": True})))
    running = {
        item["metadata"]["name"]: item["spec"].get("replicas")
        for item in of_kind(stopped, "Deployment", "StatefulSet")
        if item["spec"].get("replicas") != 0
    }
    assert set(running) == {
        item["metadata"]["name"] for item in of_kind(there, "StatefulSet") if "-nats" in item["metadata"]["name"]
    }
    assert not of_kind(stopped, "Job", "Pod", "ScaledObject", "HorizontalPodAutoscaler")
    kept = {
        (item["kind"], item["metadata"]["name"])
        for item in of_kind(there, "PersistentVolumeClaim", "Service", "Secret")
    }
    assert kept <= {(item["kind"], item["metadata"]["name"]) for item in stopped}
    assert refused(there, stopped) == refused(stopped, there) == []


def test_a_chart_of_charts_may_name_a_condition(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "charts/connito")
    depends = {"name": "connito", "version": "*", "repository": "", "condition": "connito.enabled"}
    chart = {"apiVersion": "v2", "name": "all", "version": "1.0.0", "dependencies": [depends]}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(chart))
    values = values_of("platform")
    assert render({"connito": values | {"enabled": True}, "global": {"a": 1}}, tmp_path) == render(values)
    assert render({"connito": values | {"enabled": False}}, tmp_path) == []


def check_every_own_container_is_restricted(objects: tuple[Object, ...]) -> None:
    for where, spec in pod_specs(objects).items():
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        for container in spec["containers"]:
            if container["name"] == "proxy":
                continue
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["resources"]["limits"]["memory"], where


@pytest.mark.parametrize(
    ("on", "values", "message"),
    [
        ("platform", {"coordinator": {"tolerations": [{"kee": "a"}]}}, "kee"),
        ("platform", {"coordinator": {"resources": {"limit": {"memory": "1Gi"}}}}, "limit"),
        ("platform", {"coordinator": {"resources": {"limits": {"memroy": "1Gi"}}}}, "memroy"),
        ("platform", {"validator": {"affinity": {"podAntiAfinity": {}}}}, "podAntiAfinity"),
        ("platform", {"library": {"extraEnv": [{"nam": "x"}]}}, "nam"),
        ("platform", {"image": {"digests": {"trainer": "latest"}}}, "digests"),
        ("platform", {"patches": [{"kind": "Deployment", "name": "nobody", "merge": {}}]}, "fits nothing"),
        ("bundled-nats", {"bus": {"streamReplicas": 5}}, "a server keeps one copy"),
        ("platform", {"store": {"endpoint": "http://minio:9000/connito"}}, "store/endpoint"),
        ("platform", {"coordinator": {"service": {"advertise": "connito.example.com"}}}, "advertise"),
        ("platform", {"validator": {"cache": {"size": "0"}}}, "cache/size"),
        ("platform", {"tls": {"certManager": {"enabled": True, "issuer": {"name": "i"}, "duration": "90d"}}}, "duration"),
        ("platform", patch("Deployment", {"kind": "DaemonSet"}), r"patches\[0\] on Deployment .* may not change kind"),
        ("platform", patch("Deployment", {"apiVersion": None}), "may not change apiVersion"),
        ("platform", patch("Deployment", {"metadata": {"name": "mine"}}), r"may not change metadata\.name"),
        ("platform", patch("Deployment", {"metadata": {"namespace": "other"}}), r"may not change metadata\.namespace"),
        ("platform", patch("Deployment", {"metadata": None}), "takes metadata away"),
        ("platform", patch("Deployment", {"spec": None}), "takes spec away"),
        ("platform", patch("Service", {"spec": {"selector": {"app": "mine"}}}), r"may not change spec\.selector"),
        ("platform", patch("Deployment", {"metadata": {"labels": {"tier": 1}}}), r"metadata\.labels\.tier is 1 .* quote it"),
        ("platform", {"extraObjects": [{"kind": "ConfigMap", "metadata": {"name": "a"}}]}, "has apiVersion"),
        ("platform", {"extraObjects": [{"kind": "ConfigMap", "apiVersion": "v1"}]}, "has metadata"),
        ("platform", {"networkPolicy": {"bus": {"to": [{"cidr": "10.0.0.0/8"}]}}}, "cidr"),
        ("platform", {"store": {"auth": "web-identity"}}, r"store\.sts\.endpoint"),
        ("platform", {"tls": {"certManager": {"enabled": True}}}, r"issuer\.name"),
        ("platform", {"library": {"hpa": {"enabled": True}}, "keda": {"enabled": True, "account": "A"}}, "hpa|KEDA"),
        ("platform", {"coordinator": {"ingress": {"enabled": True}}}, r"ingress\.hosts"),
        ("bundled-nats", {"nats": {"config": None}}, "names no accounts|config"),
        ("trainer", {"trainer": {"instances": [{"name": n, "existingSecret": "one"} for n in "ab"]}}, "one key runs once"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_at_once(on: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render(over(values_of(on), values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pods": {"podLabels": {"connito-workload": "x"}}}, "connito-workload is the chart's own"),
        ({"pods": {"podLabels": {"a": "x y"}}}, "podLabels/a"),
        ({"coordinator": {"service": {"labels": {"a b": "x"}}}}, "a b"),
        ({"pods": {"nodeSelector": {"a": "x y"}}}, "nodeSelector/a"),
        ({"commonAnnotations": {"a b": "c"}}, "a b"),
        ({"coordinator": {"extraVolumes": [{"name": "key", "emptyDir": {}}]}}, "two volumes of one name"),
        ({"coordinator": {"extraVolumeMounts": [{"name": "z", "mountPath": "/z"}]}}, "mounts z, and there is no such"),
        ({"coordinator": {"extraContainers": [{"name": "coordinator", "image": "a"}]}}, "two containers of one name"),
        ({"validator": {"resources": {"limits": {"memory": "2Gi"}}}}, r"requests\.memory 4Gi and may have no more than 2Gi"),
        ({"committer": {"resources": {"limits": {"cpu": "50m"}}}}, r"requests\.cpu 100m and may have no more than 50m"),
        ({"networkPolicy": {"api": {"from": [{}]}}}, "api/from/0"),
        ({"library": {"hpa": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}}, "minReplicas is 5 and maxReplicas 2"),
        ({"coordinator": {"image": {"tag": "a b"}}}, "image/tag"),
        ({"store": {"existingSecret": "My_Secret"}}, "store/existingSecret"),
        ({"pods": {"priorityClassName": "{{ .Values }}"}}, "priorityClassName"),
    ],
)  # fmt: skip
def test_what_an_api_server_would_refuse_is_refused_first(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render(over(values_of("platform"), values))


def test_a_variable_that_is_set_twice_is_there_once_as_it_was_set_last() -> None:
    more = {"env": {"CONNITO_LOG_LEVEL": "error", "A": 1}, "extraEnv": [{"name": "A", "value": "2"}]}
    objects = render(over(values_of("platform"), {"committer": more}))
    found = pod_specs(objects)["Deployment/connito-committer"]["containers"][0]["env"]
    assert len({one["name"] for one in found}) == len(found)
    assert {"name": "CONNITO_LOG_LEVEL", "value": "error"} in found
    assert {"name": "A", "value": "2"} in found
