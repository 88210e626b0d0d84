"""Identities on this machine: one key for each service, miner and validator, and the roster that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from connito.errors import Invalid
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir
from connito.wire.identity import Identity
from connito.wire.roster import Roster

SERVICES = ("coordinator", "selector", "committer", "aggregator", "library")


@dataclass(frozen=True)
class Member:
    """One key. `role` is a role of the roster, `miner`, or `operator`."""

    name: str
    role: str
    identity: Identity


def participants(miners: int, validators: int, adversaries: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, role) of every key: services, `validator-1`…, `miner-1`… and adversaries by kind, `copier-1`…"""
    found = [(name, name) for name in SERVICES]
    found += [("customer", "customer"), ("operator", "operator")]
    found += [(f"validator-{number}", "validator") for number in range(1, validators + 1)]
    found += [(f"miner-{number}", "miner") for number in range(1, miners + 1)]
    found += [
        (f"{kind}-{1 + list(adversaries[:index]).count(kind)}", "miner") for index, kind in enumerate(adversaries)
    ]
    return found


def load_members(
    data: DataDir, accounts: Accounts, participants: Sequence[tuple[str, str]], seed: int | None
) -> dict[str, Member]:
    """Read each key, or make it: at random, or with a seed always the same; and give it its passes into the broker.

    Seeds and passes lie in keys/, mode 0600. Raises `Invalid` when the folder holds keys of another seed.
    """
    members = {}
    for name, role in participants:
        identity = accounts.welcome(role, _identity(data, name, seed))
        identity.save(data.keys / f"{name}.nk")
        members[name] = Member(name, role, identity)
    return members


def _identity(data: DataDir, name: str, seed: int | None) -> Identity:
    path = data.keys / f"{name}.nk"
    wanted = (
        None if seed is None else Identity.generate(hashlib.sha256(f"connito.local:{seed}:{name}".encode()).digest())
    )
    if path.exists():
        known = Identity.load(path)
        if wanted is not None and known.public != wanted.public:
            raise Invalid(
                f"{data.root} was made with another --seed (or with none), and its keys are different; choose another "
                "--data-dir, or remove this one"
            )
        return known
    data.keys.mkdir(mode=0o700, exist_ok=True)
    return wanted or Identity.generate()


def write_roster(data: DataDir, accounts: Accounts, members: dict[str, Member]) -> Roster:
    """Write roster.json with the keys of every role, and of those who admit miners."""
    keys: dict[str, set[str]] = {}
    for member in members.values():
        if member.role != "miner":
            keys.setdefault(member.role, set()).add(member.identity.public)
    roster = Roster({role: frozenset(names) for role, names in keys.items()}, admits=accounts.signers("miner"))
    roster.save(data.roster)
    return roster
