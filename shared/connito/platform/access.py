"""An installation's keys in a folder: who may speak on the bus, and as what. Made, extended and changed without downtime.

    keys/<name>.nk    the seed of each service, validator, the customer and the operator, and its passes; mode 0600, secret
    keys/<name>.old.nk the key that a rotation is replacing, until it is finished
    accounts.json, accounts/  who admits to the broker: see `connito.platform.accounts`
    passes/<key>.pass the pass of each admitted miner, to hand over to it; no secret
    miners.txt        the public keys of admitted miners, one a line
    roster.json       which public keys speak, or once spoke, for which role; public, every participant gets a copy
    nats.conf         a NATS server for one host that trusts those accounts
    nats-values.yaml  the accounts as values of this project's chart, for `helm install -f`
    acts.jsonl        what was done with this folder, when and by whom, signed: see `connito.platform.acts`
    s3.json, s3.env   identities of a SeaweedFS S3 gateway, and the operator's own credentials; secret
    store/            what the parts of that SeaweedFS know each other by; secret
    s3/<name>.env     the credentials of each service and validator, which open what its role needs; secret

Admitting changes nothing that the server reads. A revocation is told to the running server, which closes the connections of
the key that is gone and of nobody else.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from connito.errors import Fatal, Invalid, NotFound
from connito.platform import store_guard, store_rights
from connito.platform.accounts import JETSTREAM, SERVER, Accounts
from connito.platform.acts import Acts
from connito.platform.datadir import DataDir
from connito.wire import passes
from connito.wire.identity import Identity, is_public_key
from connito.wire.roster import DUTIES, Roster
from connito.wire.subjects import check_token

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
        self.accounts = Accounts(folder)
        self.acts = Acts(folder, self._seed("operator"))

    @classmethod
    def open(cls, folder: Path) -> Access:
        """Return an existing folder. Raises `NotFound`."""
        if not (folder / "roster.json").exists():
            raise NotFound(f"{folder} holds no keys; make them with `connito access export {folder}`")
        return cls(folder)

    def export(self, validators: int = 3, miners: Iterable[str] = (), tls: Tls | None = None) -> None:
        """Make what is missing and write everything; keys and stakes that are there stay."""
        self.accounts.make()
        self._grow(max(validators, self._validators()))
        miners = list(miners)
        if tls is not None:
            _write(self.folder / "tls.json", json.dumps(tls.__dict__, indent=2) + "\n")
        # Who was admitted before there were passes gets one.
        self._admit([*self.miners, *miners])
        self.write()
        self._write_store()
        self.acts.write("export", validators=self._validators(), admitted=list(miners))

    def add(self, keys: Iterable[str]) -> dict[str, str]:
        """Admit miners; return the pass of each. Raises `Invalid` for what is no public key, or belongs to a service."""
        found = self._admit(keys)
        self.acts.write("add", keys=list(found))
        return found

    def revoke(self, keys: Iterable[str]) -> list[str]:
        """Put miners out; the broker closes their connections when it is told. Raises `Invalid` for what is no miner's key."""
        gone = list(dict.fromkeys(keys))
        self._check(gone)
        self.accounts.revoke(gone)
        self._write_miners([key for key in self.miners if key not in gone])
        for key in gone:
            self._pass(key).unlink(missing_ok=True)
        self.write()
        self.acts.write("revoke", keys=gone)
        return gone

    def enlist(self, organisation: str, key: str, duty: str, max_runs: int | None = None) -> str:
        """Make a key a member of an organisation, or give it another duty there; return its pass. `max_runs`: the quota of the
        organisation from now on, None leaves it. Raises `Invalid`.
        """
        check_token(organisation, "organisation")
        self._check([key])
        roster = self.roster()
        if duty not in DUTIES or (max_runs is not None and max_runs < 0):
            raise Invalid(f"a member is {', '.join(DUTIES)}, and a quota is a number of runs; not {duty!r}, {max_runs}")
        if other := sorted(roster.memberships(key) - {organisation}):
            raise Invalid(f"{key} belongs to {other[0]}; one key is of one organisation, so that quotas hold")
        if key in self.miners:
            raise Invalid(f"{key} is a miner's; a member needs a key of its own: `connito miner init --key FILE`")
        self.accounts.readmit([key])
        roster.organisations[organisation] = roster.organisations.get(organisation, frozenset()) | {key}
        roster.duties.setdefault(organisation, {})[key] = duty
        if max_runs is not None:
            roster.quotas[organisation] = max_runs
        self.write(roster)
        self.acts.write("enlist", organisation=organisation, key=key, duty=duty, max_runs=max_runs)
        return passes.JOINT.join(self.accounts.admit("customer", key))

    def dismiss(self, key: str) -> str:
        """Take a member out of its organisation and void its pass; return the organisation. Raises `NotFound`."""
        roster = self.roster()
        found = sorted(roster.memberships(key))
        if not found:
            raise NotFound(f"{key} is of no organisation; `connito access list` shows the members")
        for organisation in found:
            roster.organisations[organisation] -= {key}
            roster.duties.get(organisation, {}).pop(key, None)
        self.accounts.revoke([key])
        self.write(roster)
        self.acts.write("dismiss", organisation=found[0], key=key)
        return found[0]

    def rotate(self, name: str) -> Member:
        """Give a member a second key. Both may speak until `finish`. Raises `NotFound`, `Invalid` while one is under way."""
        member = self.member(name)
        if member.previous:
            raise Invalid(f"the rotation of {name} is under way; end it with `--finish` first")
        # The old key signs that it hands over to the new one.
        signer = Acts(self.folder, self._old_seed(name)) if name == "operator" else self.acts
        self._seed(name).replace(self._old_seed(name))
        self._make(name)
        self.write()
        signer.write(f"rotate {name}", key=self.member(name).key)
        return self.member(name)

    def renew_passes(self) -> dict[str, str]:
        """Replace the seeds that admit miners, and sign the passes of those who are admitted anew; return them."""
        self.accounts.renew("miner")
        found = self._admit(self.miners)
        # Miners of `connito up` have their keys here.
        spoken = {path for member in self.members() for path in (self._seed(member.name), self._old_seed(member.name))}
        for path in {*(self.folder / "keys").glob("*.nk")} - spoken:
            if (miner := Identity.load(path)).public not in self.accounts.revoked:
                self.accounts.welcome("miner", miner).save(path)
        self.write()
        self.acts.write("rotate miners", keys=list(found))
        return found

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
        self.accounts.revoke([member.previous])
        self.write(replace(roster, stakes=stakes, retired={**roster.retired, **retired}))
        self.acts.write(f"finish {name}", key=member.key, retired=member.previous)
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

    @property
    def broker(self) -> str:
        """Return the address of the broker that `connito up` runs on this folder; empty where none runs."""
        data = DataDir(self.folder)
        platform = data.read_platform()
        return platform.nats_url if platform is not None and data.owner() is not None else ""

    # Writing.

    def write(self, standing: Roster | None = None) -> None:
        """Write roster, users and server configuration from the keys in the folder and the additions of `standing`."""
        before = standing or self.roster()
        keys: dict[str, set[str]] = {}
        for member in self.members():
            keys.setdefault(member.role, set()).update({member.key, member.previous} - {""})
        keys.setdefault("customer", set()).update(*before.organisations.values())
        by_role = {role: frozenset(some) for role, some in keys.items()}
        roster = replace(before, keys=by_role, admits=self.accounts.signers("miner"))
        _write(self.folder / "roster.json", roster.to_json())
        values = {"nats": {"config": self.accounts.server("/data/jwt")}, "keda": {"account": self.accounts.platform}}
        _write(self.folder / "nats.conf", json.dumps(self._server(), indent=2) + "\n")
        # JSON is YAML.
        _write(self.folder / "nats-values.yaml", json.dumps(values, indent=2) + "\n")

    def _server(self) -> dict[str, Any]:
        return {
            "server_name": "connito",
            "http": "0.0.0.0:8222",
            **SERVER,
            "jetstream": {"store_dir": "/data/jetstream", **JETSTREAM},
            **self._tls().config(),
            **self.accounts.server("/data/jwt"),
        }

    def _tls(self) -> Tls:
        path = self.folder / "tls.json"
        return Tls(**json.loads(path.read_text())) if path.exists() else Tls()

    def _grow(self, validators: int) -> None:
        (self.folder / "keys").mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (*SERVICES, *(f"validator-{number}" for number in range(1, validators + 1))):
            self._make(name)

    def _make(self, name: str) -> None:
        """Write the key of a member with its passes; a key that is there stays."""
        path = self._seed(name)
        identity = Identity.load(path) if path.exists() else Identity.generate()
        self.accounts.welcome(name.partition("-")[0], identity).save(path)

    def _check(self, keys: Iterable[str]) -> None:
        speak = {key for member in self.members() for key in (member.key, member.previous)}
        for key in keys:
            if not is_public_key(key):
                raise Invalid(
                    f"{key!r} is not a miner's public key; `connito miner init` prints it (U…, 56 characters)"
                )
            if key in speak:
                raise Invalid(f"{key} is a service's or validator's key; a miner needs one of its own")

    def _admit(self, keys: Iterable[str]) -> dict[str, str]:
        self._check(keys := list(dict.fromkeys(keys)))
        if self.accounts.readmit(keys):
            self.write()
        found = {key: passes.JOINT.join(self.accounts.admit("miner", key)) for key in keys}
        for key, text in found.items():
            self._pass(key).parent.mkdir(exist_ok=True)
            _write(self._pass(key), text + "\n")
        self._write_miners(dict.fromkeys([*self.miners, *keys]))
        return found

    def _pass(self, key: str) -> Path:
        return self.folder / "passes" / f"{key}.pass"

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
        """Write the identities of a SeaweedFS beside the services. The operator's credentials stay; others follow from them."""
        known = self.folder / "s3.env"
        if known.exists():
            pairs = dict(line.split("=", 1) for line in known.read_text().split() if "=" in line)
            access, secret = pairs["CONNITO_S3_ACCESS_KEY"], pairs["CONNITO_S3_SECRET_KEY"]
        else:
            access, secret = f"connito-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
        roles = {path.stem: path.stem.partition("-")[0] for path in (self.folder / "keys").glob("*.nk")} | {
            "console": "console"
        }
        held = store_rights.holders(access, secret, roles)
        _write(
            self.folder / "s3.json", json.dumps({"identities": store_rights.identities(held)}, indent=2) + "\n", 0o600
        )
        if not (guard := self.folder / "store").exists():
            with suppress(Fatal):  # Of no use but to who runs that server, who has the package.
                guard.mkdir(mode=0o700)
                store_guard.write(guard, "/etc/seaweedfs/guard")
        (self.folder / "s3").mkdir(mode=0o700, exist_ok=True)
        for name, holder in held.items():
            path = known if name == "operator" else self.folder / "s3" / f"{name}.env"
            _write(path, f"CONNITO_S3_ACCESS_KEY={holder.access}\nCONNITO_S3_SECRET_KEY={holder.secret}\n", 0o600)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file where it lies: one that is mounted into a container by itself must stay the same file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
