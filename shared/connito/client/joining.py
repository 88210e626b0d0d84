"""Let a miner in: from a pass or an invite to a key that the bus admits."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from connito.client.connection import Connection
from connito.errors import Invalid
from connito.platform.membership import Membership
from connito.v1.services_pb2 import AdmitMinerCommand, AdmitMinerRequest
from connito.wire.identity import Identity
from connito.wire.invites import parse, unverified
from connito.wire.passes import parse as parse_passes
from connito.wire.tls import Tls


def join(text: str, key: Path, api: str = "") -> tuple[Identity, Membership]:
    """Put the passes for a pass or an invite (or a file with one) into the key file, and return both as they are now.

    `api`: the coordinator's, where the invite names none. Raises `Invalid` for what opens nothing, `Retry` while the
    coordinator is away.
    """
    identity = Identity.load(key)
    word = _word(text)
    # Passes are JWTs, of three parts each.
    if "." in word:
        tokens, told = parse_passes(word, identity.public), Membership.of(key)
    else:
        tokens, told = _change(word, identity, api, key.with_name("roster.json"))
        told.keep(key)
    identity = identity.with_passes(tokens)
    identity.save(key)
    return identity, told


def admitted(key: Path, invite: str) -> tuple[Identity, Membership]:
    """Return the key and what it was told. With an invite, a key that is not there is made, and one without passes joins."""
    if invite and not key.exists():
        parse(_word(invite))  # What is no invite leaves no key behind.
        Identity.generate().save(key)
    identity = Identity.load(key)
    if invite and not (identity.passes and Membership.of(key).bus):
        return join(invite, key)
    return identity, Membership.of(key)


def _word(text: str) -> str:
    path = Path(text) if len(text) < 256 else None
    return (path.read_text() if path is not None and path.is_file() else text).strip()


def _change(token: str, identity: Identity, api: str, roster: Path) -> tuple[tuple[str, ...], Membership]:
    """Return the passes for an invite, and what comes with them; a roster that is there stays."""
    invite = parse(token)
    address = api or unverified(invite).api
    if not address:
        raise Invalid("the invite names no API; add --api HOST:PORT, the coordinator's, which the operator knows")
    with closing(Connection(lambda _: address, identity, Tls.from_environment(os.environ))) as coordinator:
        asked = coordinator.seal("rpc.AdmitMiner", AdmitMinerCommand(invite=invite))
        answer = coordinator.call("coordinator", "AdmitMiner", AdmitMinerRequest(envelope=asked))
    if not roster.exists():
        roster.write_text(answer.roster_json)
    return parse_passes("\n".join(answer.passes), identity.public), Membership(answer.bus, str(roster), token)
