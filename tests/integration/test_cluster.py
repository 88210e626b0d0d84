"""The chart before a real Kubernetes API server: what it refuses, nobody's rules here had to foresee.

`scripts/install-api-server` builds the server; where it is not, these tests skip. It is of version 1.20: two groups of the API
are written there under an earlier version, and fields of later versions are unknown to it. No node, and nothing is run.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from connito.platform.servers import free_ports

from tests.support.waiting import PATIENCE
from tests.unit.helm.conftest import CHART, Object, render, values_of
from tests.unit.helm.test_corpus import CORPUS, CUSTOM, over, rendered

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.timeout(900)]

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "connito-tools"
EARLIER = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}
# Fields that Kubernetes has only since after 1.20.
LATER = {
    "ttlSecondsAfterFinished",
    "unhealthyPodEvictionPolicy",
    "loadBalancerClass",
    "ipFamilyPolicy",
    "minReadySeconds",
    "maxUnavailable",
    "behavior",
}


class Server:
    """An API server over an etcd of its own, that admits one token."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        etcd, peers, port = free_ports(3)
        self.url = f"https://127.0.0.1:{port}"
        key = folder / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        (folder / "tokens.csv").write_text(f"{self.token},admin,1,system:masters\n")
        own = f"http://127.0.0.1:{etcd}"
        commands = (
            ["etcd", "--data-dir", folder / "etcd", "--listen-client-urls", own, "--advertise-client-urls", own,
             "--listen-peer-urls", f"http://127.0.0.1:{peers}"],
            [FOLDER / "kube-apiserver", "--etcd-servers", own, "--bind-address=127.0.0.1", f"--secure-port={port}",
             f"--cert-dir={folder}", f"--token-auth-file={folder}/tokens.csv", "--service-cluster-ip-range=10.0.0.0/16,fd00:1::/112",  # noqa: E501
             f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
             "--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC",
             "--disable-admission-plugins=ServiceAccount,Priority", "--feature-gates=GenericEphemeralVolume=true,IPv6DualStack=true"],  # noqa: E501
        )  # fmt: skip
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.processes = [
                subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=folder) for command in commands
            ]
        give_up = time.monotonic() + PATIENCE
        while not self._ready():
            assert time.monotonic() < give_up, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            return bool(self.call("GET", "/readyz"))
        except (urllib.error.URLError, AssertionError):
            return False

    def call(self, method: str, path: str, body: Object | None = None, patch: str = "") -> Any:
        """What the server answers. Raises `AssertionError` with its words where it refuses."""
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        request.add_header("Content-Type", f"application/{patch}-patch+json" if patch else "application/json")
        data = None if body is None else json.dumps(body).encode()
        context = ssl._create_unverified_context()
        try:
            with urllib.request.urlopen(request, data, timeout=60, context=context) as answer:
                said = answer.read().decode()
                return json.loads(said) if said.startswith("{") else said
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:2000]}") from error

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Server:
    if not (FOLDER / "kube-apiserver").exists() or shutil.which("etcd") is None:
        pytest.skip("NO API SERVER WAS ASKED: scripts/install-api-server builds one, in some minutes")
    started = Server(tmp_path_factory.mktemp("cluster"))
    request.addfinalizer(started.stop)  # noqa: PT021 - also where what follows fails
    started.call("POST", "/api/v1/namespaces", {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "ml"}})
    kinds = {(item["apiVersion"], item["kind"]) for name in CORPUS for item in rendered(name) if item["kind"] in CUSTOM}
    for version, kind in sorted(kinds):
        started.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition(version, kind))
    return started


def plural(kind: str) -> str:
    lower = kind.lower()
    return f"{lower[:-1]}ies" if lower.endswith("y") else f"{lower}es" if lower.endswith("s") else f"{lower}s"


def definition(version: str, kind: str) -> Object:
    """A kind of somebody's operator, whose fields may be anything."""
    group, _, name = version.partition("/")
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    versions = [{"name": name, "served": True, "storage": True, "schema": schema}]
    names = {"plural": plural(kind), "kind": kind}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural(kind)}.{group}", "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {"group": group, "names": names, "scope": "Namespaced", "versions": versions},
    }  # fmt: skip


def place(item: Object) -> str:
    """Where objects of this kind are."""
    said: str = item["apiVersion"]
    version = EARLIER.get(said, said)
    start = f"/api/{version}" if "/" not in version else f"/apis/{version}"
    return f"{start}/namespaces/ml/{plural(item['kind'])}"


def lost(sent: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Fields that were sent and that the server did not keep: it does not know them."""
    if isinstance(sent, dict):
        if not isinstance(kept, dict):
            yield where
            return
        for name, value in sent.items():
            if value in (None, {}, [], "", 0, False):
                continue
            if name not in kept:
                yield f"{where}.{name}"
            else:
                yield from lost(value, kept[name], f"{where}.{name}")
    if isinstance(sent, list) and isinstance(kept, list):
        for one, other in zip(sent, kept, strict=False):
            yield from lost(one, other, where)


def test_every_object_of_the_corpus_is_taken(server: Server) -> None:
    seen: set[str] = set()
    for name in sorted(CORPUS):
        for item in rendered(name):
            if (text := json.dumps(item, sort_keys=True)) in seen:
                continue
            seen.add(text)
            early = item | {"apiVersion": EARLIER.get(item["apiVersion"], item["apiVersion"])}
            kept = server.call("POST", f"{place(item)}?dryRun=All", early)
            unknown = [path for path in lost(early, kept) if path.rpartition(".")[2] not in LATER]
            assert unknown == [], (name, item["kind"], item["metadata"]["name"])
    assert len(seen) > 300


def test_the_server_refuses_what_nobody_could_run(server: Server) -> None:
    (broken,) = [item for item in rendered("plain") if item["kind"] == "Deployment"][:1]
    text = json.dumps(broken)
    for old, new in (('"readOnly": true', '"readOnlee": true'), ('"mountPath": "/tmp"', '"mountPath": ""')):
        assert old in text
        item = json.loads(text.replace(old, new, 1))
        try:
            kept = server.call("POST", f"{place(item)}?dryRun=All", item)
        except AssertionError as error:
            assert "mountPath" in str(error)  # noqa: PT017 - either the server refuses, or a field is lost
        else:
            assert list(lost(item, kept))


def named(values: dict[str, Any], release: str, chart: Path = CHART) -> dict[tuple[str, str], Object]:
    """What Helm would send of a release: kind and name -> object. Tests are none of it."""
    objects = render(values, chart=chart, name=release)
    sent = [item for item in objects if not (item["metadata"].get("annotations") or {}).get(HOOK)]
    return {(item["kind"], item["metadata"]["name"]): item for item in sent}


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This chart as its next version."""
    chart = tmp_path_factory.mktemp("chart") / "connito"
    shutil.copytree(CHART, chart)
    (chart / "Chart.yaml").write_text((chart / "Chart.yaml").read_text().replace("0.1.0", "0.1.1"))
    return chart


HOOK = "helm.sh/hook"


def gone(old: Any, new: Any) -> Any:
    """`new`, with null for what was in `old` and is no more, as Helm's patch has it."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {key: gone(old.get(key), new[key]) if key in new else None for key in {**old, **new}}


def upgrade(server: Server, old: dict[tuple[str, str], Object], new: dict[tuple[str, str], Object]) -> None:
    """Create, patch and delete as an upgrade does. Raises `AssertionError` with the server's words where it refuses."""
    for key, item in new.items():
        early = item | {"apiVersion": EARLIER.get(item["apiVersion"], item["apiVersion"])}
        if key in old:
            server.call(
                "PATCH",
                f"{place(item)}/{key[1]}",
                gone(old[key], early),
                "merge" if key[0] in CUSTOM else "strategic-merge",
            )
        else:
            server.call("POST", place(item), early)
    for key in old.keys() - new.keys():
        where = f"{place(old[key])}/{key[1]}"
        server.call("DELETE", f"{where}?propagationPolicy=Background")
        # A volume waits for a controller to let it go, and there is none.
        if key[0] == "PersistentVolumeClaim":
            server.call("PATCH", where, {"metadata": {"finalizers": None}}, "merge")


def versions(server: Server, release: dict[tuple[str, str], Object]) -> dict[tuple[str, str], str]:
    """Kind and name -> version of each object, as the server has it."""
    return {
        key: server.call("GET", f"{place(item)}/{key[1]}")["metadata"]["resourceVersion"]
        for key, item in release.items()
    }


def values(name: str) -> dict[str, Any]:
    case = CORPUS[name]
    return over(values_of(case["base"]), case["values"])


def test_two_releases_are_installed_upgraded_and_removed(server: Server, newer: Path) -> None:
    one, two = (named(values("everything"), release) for release in ("one", "two"))
    for release in (one, two):
        upgrade(server, {}, release)
    seen = versions(server, two)
    assert len(seen) > 40
    changed = named(over(values("everything"), {"logs": {"level": "debug"}}), "one", newer)
    assert changed != one
    upgrade(server, one, changed)
    upgrade(server, changed, one)
    assert versions(server, two) == seen
    upgrade(server, one, {})
    assert versions(server, two) == seen
    upgrade(server, two, {})


# These begin or end with what a server that runs nothing cannot do: a claim that is bound may grow.
BOUND = {name for name, case in CORPUS.items() if case.get("grows")}
IMMUTABLE = {name for name, case in CORPUS.items() if case.get("immutable")}
PLAIN = {"platform": "plain", "production": "everything", "trainer": "miner", "bundled-nats": "bundled"}


@pytest.mark.parametrize("base", sorted(PLAIN))
def test_every_change_of_values_is_taken_there_and_back(server: Server, newer: Path, base: str) -> None:
    release = f"r-{secrets.token_hex(3)}"
    plain = named(values(PLAIN[base]), release)
    upgrade(server, {}, plain)
    cases = [name for name, case in sorted(CORPUS.items()) if case["base"] == base and name != PLAIN[base]]
    for name in cases:
        changed = named(values(name), release, CHART if name in IMMUTABLE | BOUND else newer)
        if name in IMMUTABLE | BOUND:
            with pytest.raises(AssertionError, match=r"(?i)forbidden|immutable|may not change"):
                upgrade(server, plain, changed)
            upgrade(server, {key: changed.get(key, item) for key, item in plain.items()}, plain)
        else:
            upgrade(server, plain, changed)
            upgrade(server, changed, plain)
    upgrade(server, plain, {})
