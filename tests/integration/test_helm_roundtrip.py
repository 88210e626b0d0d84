"""What `helm test` runs in the cluster, run against real servers with an operator's real permissions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from connito.platform.servers import NatsServer, ObjectStore, free_ports
from connito.store import ArtifactStore
from connito.wire.identity import Identity
from connito.wire.passes import parse

from tests.integration.witness import guard

SCRIPT = Path(__file__).parents[2] / "helm/connito/files/roundtrip.py"


class Placed(NatsServer):
    """A server with an operator's nats.conf; where the data lie, and at which port it listens, is this machine's."""

    def __init__(self, data_dir: Path, conf: Path) -> None:
        super().__init__(data_dir)
        self.conf = conf

    def _config(self) -> dict[str, Any]:
        theirs: dict[str, Any] = json.loads(self.conf.read_text())
        theirs["resolver"]["dir"] = str(self.data_dir / "jwt")
        theirs["jetstream"]["store_dir"] = str(self.data_dir / "jetstream")
        own = {"server_name": self._name, "host": "127.0.0.1", "port": self.port}
        return theirs | own | {"http": f"127.0.0.1:{free_ports(1)[0]}"}


def run(
    nats: NatsServer, objects: ObjectStore, bucket: str, key: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")}
    environment |= {
        "CONNITO_NATS_URL": nats.url,
        "CONNITO_KEY_FILE": str(key),
        "CONNITO_S3_ENDPOINT": objects.url,
        "CONNITO_S3_ACCESS_KEY": objects.access_key,
        "CONNITO_S3_SECRET_KEY": objects.secret_key,
        "CONNITO_S3_BUCKET": bucket,
    }
    return subprocess.run(
        [sys.executable, SCRIPT], check=False, env=environment | more, capture_output=True, text=True, timeout=60
    )


async def test_an_event_and_an_object_go_around(
    own_nats: NatsServer, object_store: ObjectStore, store: ArtifactStore, tmp_path: Path
) -> None:
    people = {"operator": Identity.generate()}
    guard(own_nats, people)
    people["operator"].save(tmp_path / "operator.nk")
    for _ in range(2):
        done = run(own_nats, object_store, store.bucket, tmp_path / "operator.nk")
        assert done.returncode == 0, done.stderr
        assert "received unchanged" in done.stdout
        assert "digest verified" in done.stdout


def test_the_test_fails_where_the_store_refuses(
    nats_server: NatsServer, object_store: ObjectStore, tmp_path: Path
) -> None:
    Identity.generate().save(tmp_path / "operator.nk")
    done = run(nats_server, object_store, "connito", tmp_path / "operator.nk", CONNITO_S3_SECRET_KEY="wrong")
    assert done.returncode != 0
    assert "store" in done.stderr


def test_operator_keys_are_a_working_bus(tmp_path: Path, object_store: ObjectStore) -> None:
    """The configuration that `scripts/operator-keys` writes lets its keys in, each with its role's permissions."""
    root = SCRIPT.parents[3]
    out = tmp_path / "secrets"
    for _ in range(2):  # the second time keeps what is there
        subprocess.run([sys.executable, root / "scripts/operator-keys", out, "--validators", "2"], check=True, cwd=root)
    conf = json.loads((out / "nats.conf").read_text())
    chart = json.loads((out / "nats-values.yaml").read_text())["nats"]["config"]
    trusted = {"operator", "system_account", "resolver", "resolver_preload"}
    assert chart == {name: value for name, value in conf.items() if name in trusted}
    miner = Identity.generate().public
    subprocess.run([sys.executable, root / "scripts/operator-keys", out, "--miner", miner], check=True, cwd=root)
    assert parse((out / "passes" / f"{miner}.pass").read_text(), miner)
    with Placed(tmp_path / "nats", out / "nats.conf") as server:
        for name, permitted in (("operator", True), ("validator-1", False)):
            environment = os.environ | {
                "CONNITO_NATS_URL": server.url,
                "CONNITO_KEY_FILE": str(out / "keys" / f"{name}.nk"),
                "CONNITO_ROSTER": str(out / "roster.json"),
            }
            command = [sys.executable, "-c", "from connito.cli import main; main()", "streams", "ensure"]
            done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
            assert (done.returncode == 0) == permitted, (name, done.stdout, done.stderr)
