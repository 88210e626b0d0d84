"""The rollout against an API server that behaves as Kubernetes does: one pod away at a time, budgets respected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from .conftest import CHART, find, rendered

SETS = {"c-validator-a": "validator", "c-validator-b": "validator", "c-trainer-x": "trainer", "c-nats": "nats"}


class Cluster:
    """StatefulSets whose template has changed, and their pods. An evicted pod is away for three looks at it."""

    def __init__(self) -> None:
        self.pods: dict[str, Any] = {f"{name}-0": {"uid": "old", "revision": "1", "away": 0} for name in SETS}
        self.events: list[str] = []
        self.refusals = 1
        self.broken = ""

    def get(self, path: str) -> Any:
        name = path.rsplit("/", 1)[1]
        if name.startswith("statefulsets?"):
            return {"items": [self.stateful_set(name) for name in SETS]}
        if "/statefulsets/" in path:
            return self.stateful_set(name)
        pod = self.pods[name]
        if pod["away"]:
            pod["away"] -= 1
            if pod["away"]:
                return None
            pod |= {"uid": "new", "revision": "2"}
            self.events.append(f"back {name}")
        ready = "False" if name == self.broken and pod["uid"] == "new" else "True"
        return {
            "metadata": {"uid": pod["uid"], "labels": {"controller-revision-hash": pod["revision"]}},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }

    def stateful_set(self, name: str) -> dict[str, Any]:
        labels = {"app.kubernetes.io/component": SETS[name]}
        status = {"observedGeneration": 2, "updateRevision": "2"}
        return {"metadata": {"name": name, "generation": 2, "labels": labels}, "status": status}

    def evict(self, name: str) -> int:
        if self.refusals:
            self.refusals -= 1
            return 429
        self.events.append(f"drain {name}")
        self.pods[name]["away"] = 3
        return 201


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Cluster, dict[str, str]]]:
    state = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, code: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            found = state.get(self.path)
            self.answer(200 if found else 404, found)

        def do_POST(self) -> None:
            assert self.headers["Authorization"] == "Bearer secret"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["kind"] == "Eviction"
            self.answer(state.evict(self.path.split("/")[-2]), {})

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "token").write_text("secret")
    (tmp_path / "namespace").write_text("ml")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "API_SERVER": f"http://127.0.0.1:{server.server_port}",
        "ACCOUNT_DIR": str(tmp_path),
        "SELECTOR": "app.kubernetes.io/instance=c",
        "PAUSE_SECONDS": "0.01",
        "TIMEOUT_SECONDS": "20",
    }
    yield state, environment
    server.shutdown()
    server.server_close()


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHART / "files/rollout.py")]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


def test_one_is_away_at_a_time_and_nats_is_left_alone(cluster: tuple[Cluster, dict[str, str]]) -> None:
    state, environment = cluster
    done = run(environment)
    assert done.returncode == 0, done.stderr
    order = ["c-validator-a-0", "c-validator-b-0", "c-trainer-x-0"]
    assert state.events == [f"{event} {name}" for name in order for event in ("drain", "back")]


def test_a_second_run_finds_nothing_to_do(cluster: tuple[Cluster, dict[str, str]]) -> None:
    state, environment = cluster
    run(environment)
    state.events.clear()
    assert run(environment).returncode == 0
    assert state.events == []


def test_a_version_that_does_not_come_up_stops_there(cluster: tuple[Cluster, dict[str, str]]) -> None:
    state, environment = cluster
    state.broken = "c-validator-a-0"
    done = run(environment | {"TIMEOUT_SECONDS": "1"})
    assert done.returncode == 1
    assert "c-validator-a is not ready after 1 s" in done.stderr
    assert state.events == ["drain c-validator-a-0", "back c-validator-a-0"]


def test_the_controller_leaves_the_restart_to_the_rollout() -> None:
    sets = find(rendered("platform"), "StatefulSet", "connito-validator-a")["spec"]
    assert sets["updateStrategy"] == {"type": "OnDelete"}
    rights = find(rendered("platform"), "Role", "connito-rollout")["rules"]
    assert {verb for rule in rights for verb in rule["verbs"]} == {"get", "list", "create"}
