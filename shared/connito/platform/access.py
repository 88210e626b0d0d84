"""An installation's keys in a folder: who may speak on the bus, and as what. Made, extended and changed without downtime.

    keys/<name>.nk    the nkey seed of each service, validator, the customer and the operator; mode 0600, secret
    keys/<name>.old.nk the seed that a rotation is replacing, until it is finished
    roster.json       which public keys speak, or once spoke, for which role; public, every participant gets a copy
    users.json        the keys with their permissions on the bus, as NATS reads them; public keys only
    nats.conf         a NATS server for one host with those users
    nats-values.yaml  the same users as values of the official NATS chart, for `helm install -f`
    miners.txt        the public keys of admitted miners, one a line
    s3.json, s3.env   credentials of a SeaweedFS S3 gateway; secret

NATS takes a changed user list on a reload (SIGHUP) without touching the connections of anybody else, and closes those
of keys that are gone. Operator and account JWTs would do the same with one more secret to keep and a resolver to run;
with some hundreds of keys, a list is what a person can read and compare.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connito.bus.permissions import broker_user
from connito.errors import Invalid, NotFound
from connito.wire.identity import Identity, is_public_key
from connito.wire.roster import Roster

SERVICES = ("coordinator", "selector", "committer", "aggregator", "library", "customer", "operator")


@dataclass(frozen=True)
class Member:
    """A participant with a key in the folder."""

    name: str
    role: str
    key: str
    previous: str = ""


@dataclass(frozen=True)
class Tls:
    """Paths, as the NATS server sees them, of its certificate and key, and of the authority of client certificates."""

    certificate: str = ""
    key: str = ""
    client_ca: str = ""

    def config(self) -> dict[str, Any]:
        """Return the server's `tls` block; empty without a certificate."""
        if not self.certificate:
            return {}
        block: dict[str, Any] = {"cert_file": self.certificate, "key_file": self.key}
        return {"tls": block | ({"ca_file": self.client_ca, "verify": True} if self.client_ca else {})}


class Access:
    """The folder. Every change writes all files that follow from it; a server reads them when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> Access:
        """Return an existing folder. Raises `NotFound`."""
        if not (folder / "roster.json").exists():
            raise NotFound(f"{folder} holds no keys; make them with `connito access export {folder}`")
        return cls(folder)

    def export(self, validators: int = 3, miners: Iterable[str] = (), tls: Tls | None = None) -> None:
        """Make what is missing and write everything; keys and stakes that are there stay."""
        self._grow(max(validators, self._validators()))
        if tls is not None:
            _write(self.folder / "tls.json", json.dumps(tls.__dict__, indent=2) + "\n")
        self._admit(miners)
        self.write()
        self._write_store()

    def add(self, keys: Iterable[str]) -> list[str]:
        """Admit miners; the keys that are new. Raises `Invalid` for what is no public key, or belongs to a service."""
        new = self._admit(keys)
        self.write()
        return new

    def revoke(self, keys: Iterable[str]) -> list[str]:
        """Put miners out; the broker closes their connections when it reloads. Raises `NotFound` for a key not in."""
        gone, known = list(dict.fromkeys(keys)), self.miners
        for key in gone:
            if key not in known:
                raise NotFound(f"{key} is not among the admitted miners of {self.folder}; see `connito access list`")
        self._write_miners([key for key in known if key not in gone])
        self.write()
        return gone

    def rotate(self, name: str) -> Member:
        """Give a member a second key. Both may speak until `finish`. Raises `NotFound`, `Invalid` while one is under way."""
        member = self.member(name)
        if member.previous:
            raise Invalid(f"the rotation of {name} is under way; end it with `--finish` first")
        self._seed(name).replace(self._old_seed(name))
        Identity.generate().save(self._seed(name))
        self.write()
        return self.member(name)

    def finish(self, name: str, now_ms: int | None = None) -> Member:
        """End a rotation: the old key may say nothing any more, and what it has said until now stays valid."""
        member = self.member(name)
        if not member.previous:
            raise Invalid(f"no rotation of {name} is under way; begin one with `connito access rotate`")
        roster = self.roster()
        until = now_ms if now_ms is not None else time.time_ns() // 1_000_000
        retired = {**roster.retired, member.previous: (member.role, until)} if member.role != "operator" else {}
        stakes = dict(roster.stakes)
        if member.previous in stakes:
            stakes.setdefault(member.key, stakes[member.previous])
        self._old_seed(name).unlink()
        self.write(Roster({}, stakes, {**roster.retired, **retired}))
        return self.member(name)

    # Reading.

    @property
    def miners(self) -> list[str]:
        """Return public keys of admitted miners, in the order of admission."""
        path = self.folder / "miners.txt"
        return path.read_text().split() if path.exists() else []

    def members(self) -> list[Member]:
        """Return services, validators, customer and operator."""
        names = [*SERVICES, *(f"validator-{number}" for number in range(1, self._validators() + 1))]
        return [self.member(name) for name in names if self._seed(name).exists()]

    def member(self, name: str) -> Member:
        """Return one of them. Raises `NotFound`."""
        if not self._seed(name).exists():
            raise NotFound(f"{self.folder} holds no key of {name!r}; `connito access list` shows the names")
        old = self._old_seed(name)
        previous = Identity.load(old).public if old.exists() else ""
        return Member(name, name.partition("-")[0], Identity.load(self._seed(name)).public, previous)

    def roster(self) -> Roster:
        """Return the roster as it is written."""
        path = self.folder / "roster.json"
        return Roster.load(path) if path.exists() else Roster()

    def users(self) -> list[dict[str, Any]]:
        """Return the users that the broker admits, in its own syntax."""
        spoken = [(m.role, key) for m in self.members() for key in (m.key, m.previous) if key]
        return [broker_user(role, key) for role, key in [*spoken, *(("miner", key) for key in self.miners)]]

    # Writing.

    def write(self, standing: Roster | None = None) -> None:
        """Write roster, users and server configuration from the keys in the folder and the additions of `standing`."""
        before = standing or self.roster()
        keys: dict[str, set[str]] = {}
        for member in self.members():
            keys.setdefault(member.role, set()).update({member.key, member.previous} - {""})
        roster = Roster({role: frozenset(some) for role, some in keys.items()}, before.stakes, before.retired)
        _write(self.folder / "roster.json", roster.to_json())
        users = self.users()
        values = {"nats": {"config": {"merge": {"max_payload": "<< 2MB >>", "authorization": {"users": users}}}}}
        _write(self.folder / "users.json", json.dumps(users, indent=2) + "\n")
        _write(self.folder / "nats.conf", json.dumps(self._server(users), indent=2) + "\n")
        # JSON is YAML.
        _write(self.folder / "nats-values.yaml", json.dumps(values, indent=2) + "\n")

    def _server(self, users: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "server_name": "connito",
            "http": "0.0.0.0:8222",
            "max_payload": 2 << 20,
            "jetstream": {"store_dir": "/data/jetstream", "sync_interval": "always"},
            **self._tls().config(),
            "authorization": {"users": users},
        }

    def _tls(self) -> Tls:
        path = self.folder / "tls.json"
        return Tls(**json.loads(path.read_text())) if path.exists() else Tls()

    def _grow(self, validators: int) -> None:
        (self.folder / "keys").mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (*SERVICES, *(f"validator-{number}" for number in range(1, validators + 1))):
            if not self._seed(name).exists():
                Identity.generate().save(self._seed(name))

    def _admit(self, keys: Iterable[str]) -> list[str]:
        known = self.miners
        speak = {key for member in self.members() for key in (member.key, member.previous)}
        new = []
        for key in dict.fromkeys(keys):
            if not is_public_key(key):
                raise Invalid(
                    f"{key!r} is not a miner's public key; `connito miner init` prints it (U…, 56 characters)"
                )
            if key in speak:
                raise Invalid(f"{key} is a service's or validator's key; a miner needs one of its own")
            if key not in known:
                new.append(key)
        self._write_miners([*known, *new])
        return new

    def _write_miners(self, keys: Iterable[str]) -> None:
        _write(self.folder / "miners.txt", "".join(f"{key}\n" for key in keys))

    def _validators(self) -> int:
        found = [path.stem for path in (self.folder / "keys").glob("validator-*.nk")]
        return max((int(name[10:]) for name in found if name[10:].isdigit()), default=0)

    def _seed(self, name: str) -> Path:
        return self.folder / "keys" / f"{name}.nk"

    def _old_seed(self, name: str) -> Path:
        return self.folder / "keys" / f"{name}.old.nk"

    def _write_store(self) -> None:
        """Write credentials for a SeaweedFS beside the services, unless they exist."""
        if (self.folder / "s3.json").exists():
            return
        access, secret = f"connito-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
        identity: Mapping[str, Any] = {
            "name": "connito",
            "credentials": [{"accessKey": access, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write(self.folder / "s3.json", json.dumps({"identities": [identity]}, indent=2) + "\n", 0o600)
        _write(self.folder / "s3.env", f"CONNITO_S3_ACCESS_KEY={access}\nCONNITO_S3_SECRET_KEY={secret}\n", 0o600)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file where it lies: one that is mounted into a container by itself must stay the same file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
