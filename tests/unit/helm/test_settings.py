"""Chart, compose files and the systemd unit set only variables that the services know, and name files that exist."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from connito.runtime.settings import ServiceSettings
from helm_python.errors import HelmError

from .conftest import ROOT, Object, environment, pod_specs, render, values_of

SERVICES = ("coordinator", "selector", "committer", "aggregator", "library", "console", "trainer", "validator")
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
TRAINER = yaml.safe_load((ROOT / "deploy/trainer/compose.yaml").read_text())
OURS = {name: body for name, body in COMPOSE["services"].items() if body["image"].startswith("connito-")}


def known(service: str) -> set[str]:
    """The variables that `python -m services.<service>` reads."""
    if service == "serve":
        options = (ROOT / "shared/connito/cli/serve.py").read_text()
        return {"CONNITO_SHELF", *(f"CONNITO_SERVE_{name}" for name in re.findall(r'_variable\("(\w+)"\)', options))}
    if service not in SERVICES:
        return {row[0] for row in ServiceSettings.describe()} | {"CONNITO_FOR_VERSION"}
    module = importlib.import_module(f"services.{service}.settings")
    (settings,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ServiceSettings) and value.__module__ == module.__name__
    ]
    return {row[0] for row in settings.describe()} | {"CONNITO_FOR_VERSION"}


def ours(variables: Any) -> set[str]:
    return {name for name in variables if name.startswith("CONNITO_")}


def test_the_chart_sets_known_variables(objects: list[Object]) -> None:
    for spec in pod_specs(objects).values():
        container = spec["containers"][0]
        assert ours(environment(container)) <= known(container["name"])


@pytest.mark.parametrize("name", sorted(OURS))
def test_compose_sets_known_variables(name: str) -> None:
    assert ours(OURS[name]["environment"]) <= known(re.sub(r"-\d+$", "", name))


def test_the_miner_s_files_set_known_variables() -> None:
    for body in TRAINER["services"].values():
        assert ours(body["environment"]) <= known("trainer")
    unit = (ROOT / "deploy/trainer/connito-trainer.service").read_text()
    assert ours(re.findall(r"Environment=(\w+)=", unit)) <= known("trainer")


def test_images_set_known_variables() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert set(re.findall(r"(CONNITO_\w+)=", dockerfile)) <= known("trainer")


@pytest.mark.parametrize("name", [*sorted(OURS), "trainer", "trainer-cuda"])
def test_compose_services_are_locked_down(name: str) -> None:
    body = {**OURS, **TRAINER["services"]}[name]
    assert body["read_only"] is True
    assert body["cap_drop"] == ["ALL"]
    assert body["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in body
    assert [secret for secret in body["secrets"] if secret == "key" or secret["target"] == "key"]


def test_compose_builds_targets_that_exist() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "deploy/Dockerfile").read_text(), re.M))
    for body in [*OURS.values(), *TRAINER["services"].values()]:
        if "build" in body:
            assert body["build"]["target"] in targets
    assert {*SERVICES, "tools", "trainer-cuda", "validator-cuda"} <= targets


def test_compose_mounts_files_that_exist() -> None:
    for body in COMPOSE["services"].values():
        for volume in body.get("volumes", []):
            source = str(volume["source"])
            if volume["type"] == "bind" and source.startswith("."):
                assert (ROOT / "deploy" / source).exists(), source
            elif volume["type"] == "volume":
                assert source in COMPOSE["volumes"]


def test_prometheus_scrapes_every_service_of_compose() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text())
    targets = {
        target.split(":")[0] for entry in config["scrape_configs"][0]["static_configs"] for target in entry["targets"]
    }
    assert targets == set(OURS) - {"streams", "bucket"}
    (store,) = config["scrape_configs"][1]["static_configs"][0]["targets"]
    assert f"-metricsPort={store.partition(':')[2]}" in COMPOSE["services"]["store"]["command"]


def test_locks_agree_with_the_constraints() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(), re.M)
        return {name.lower().replace("_", "-"): version for name, version in lines}

    constraints = pins(ROOT / "constraints.txt")
    for lock in sorted((ROOT / "deploy/locks").glob("*.txt")):
        for name, version in pins(lock).items():
            if name in constraints:
                assert version == constraints[name], f"{lock.name}: run scripts/lock-images"


def test_everything_in_a_lock_has_a_hash() -> None:
    for lock in sorted((ROOT / "deploy/locks").glob("*.txt")):
        for entry in re.findall(r"(?m)^[a-z].*(?:\n +.*)*", lock.read_text()):
            assert "--hash=sha256:" in entry, (lock.name, entry[:60])


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "deploy/Dockerfile"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_certificates_reach_every_service_and_are_asked_for_where_they_are_needed() -> None:
    values = values_of("platform")
    with pytest.raises(HelmError, match=r"tls\.existingSecret"):
        render(values | {"tls": {"grpc": "mtls"}})
    for spec in pod_specs(render(values | {"tls": {"existingSecret": "certs", "grpc": "mtls"}})).values():
        container = spec["containers"][0]
        variables = environment(container)
        if "CONNITO_NATS_URL" not in variables:
            continue
        assert variables["CONNITO_GRPC_TLS"] == "mtls"
        folder = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "tls")
        assert all(variables[f"CONNITO_TLS_{name}"].startswith(f"{folder}/") for name in ("CA", "CERT", "KEY"))
        volume = next(v["projected"] for v in spec["volumes"] if v["name"] == "tls")
        assert volume["sources"] == [{"secret": {"name": "certs"}}]
