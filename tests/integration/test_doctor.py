"""`connito doctor` over a real broker and a real store: what it finds, and the remedy where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from connito.platform.servers import NatsServer, ObjectStore, free_ports
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.integration.conftest import BusFactory
from tests.integration.test_selector import store_env

pytestmark = pytest.mark.integration


@pytest.fixture
def environment(
    own_nats: NatsServer, object_store: ObjectStore, store: ArtifactStore, tmp_path: Path,
    identities: dict[str, Identity], roster: Roster,
) -> dict[str, str]:  # fmt: skip
    identities["customer"].save(tmp_path / "key")
    roster.save(tmp_path / "roster.json")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")},
        **store_env(object_store, store),
        "CONNITO_NATS_URL": own_nats.url,
        "CONNITO_KEY_FILE": str(tmp_path / "key"),
        "CONNITO_ROSTER": str(tmp_path / "roster.json"),
        "CONNITO_CACHE_DIR": str(tmp_path / "cache"),
    }


def doctor(environment: dict[str, str], **changes: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "connito.cli", "doctor", "--json"]
    done = subprocess.run(command, env=environment | changes, capture_output=True, text=True, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert all(check["ok"] or check["remedy"] for check in checks.values())
    return done.returncode, checks


def test_a_platform_that_is_well(environment: dict[str, str]) -> None:
    code, checks = doctor(environment)
    assert code == 0, checks
    assert checks["nats-server version"]["ok"]
    assert abs(float(checks["clock"]["found"].split()[0])) < 5
    assert checks["runs"]["found"] == "no run is under way"
    assert "MB/s up" in checks["bandwidth"]["found"]
    # The probe lies in the store under its hash, and is not written twice.
    assert "up not measured" in doctor(environment)[1]["bandwidth"]["found"]


async def test_a_run_that_nobody_moves_is_named(
    environment: dict[str, str],
    own_nats: NatsServer,
    bus_factory: BusFactory,
    identities: dict[str, Identity],
    run_id: str,
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    created = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run_id, domain="medical", cycles=2))
    assert await bus.publish_fact(run_id, "run", 0, "created", created)
    made = run_pb2.SelectionMade(run=run_id)
    selector = await bus_factory(identities["selector"], own_nats.url)
    assert await selector.publish_fact(run_id, "run", 0, "selected", made)
    past = int(time.time() * 1000) - 3_600_000
    opened = cycle_pb2.WindowOpened(run=run_id, cycle=1, deadline_unix_ms=past, window=cycle_pb2.WINDOW_TRAIN)
    assert await bus.publish_fact(run_id, "train", 1, "opened", opened)
    code, checks = doctor(environment)
    assert (code, checks["runs"]["ok"]) == (0, True), "it waits for people, and nothing is wrong"
    closed = cycle_pb2.WindowClosed(run=run_id, cycle=1, window=cycle_pb2.WINDOW_TRAIN)
    assert await bus.publish_fact(run_id, "train", 1, "closed", closed)
    opened.window = cycle_pb2.WINDOW_COMMIT
    assert await bus.publish_fact(run_id, "commit", 1, "opened", opened)
    # In a window of no length nobody has been heard: it is overdue some seconds after it was opened.
    code, checks = doctor(environment)
    for _ in range(20):
        if not checks["runs"]["ok"]:
            break
        code, checks = doctor(environment)
    assert (code, checks["runs"]["ok"]) == (0, False)
    assert f"{run_id}: cycle 1 of 2: commit" in checks["runs"]["found"]
    assert "coordinator" in checks["runs"]["remedy"]


def test_what_is_wrong_is_named_with_a_remedy(environment: dict[str, str]) -> None:
    code, checks = doctor(environment, CONNITO_S3_SECRET_KEY="another")
    assert (code, checks["store rights"]["ok"]) == (5, False)
    nobody = free_ports(1)[0]
    code, checks = doctor(environment, CONNITO_NATS_URL=f"nats://127.0.0.1:{nobody}", CONNITO_S3_ACCESS_KEY="")
    assert (code, checks["broker"]["ok"]) == (5, False)
    busy = environment["CONNITO_NATS_URL"].rpartition(":")[2]
    code, checks = doctor(environment, CONNITO_HTTP_PORT=busy)
    assert code == 0
    assert not checks[f"port {busy} (http)"]["ok"]


def test_a_certificate_that_cannot_be_had_is_no_silence(environment: dict[str, str]) -> None:
    """The store speaks no TLS here: where it is said to, the certificate's line says what came instead."""
    plain = environment["CONNITO_S3_ENDPOINT"]
    _, checks = doctor(environment, CONNITO_S3_ENDPOINT=plain.replace("http://", "https://"))
    (line,) = [check for name, check in checks.items() if name.startswith("certificate of")]
    assert not line["ok"]
