"""What the committer's API answers, beside what it judges."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.errors import Invalid, NotFound, ObjectMissing, VerificationFailed
from connito.protocol.entitlement import Naming
from connito.runtime.limits import RateLimit
from connito.store import get_presigned
from connito.v1 import run_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_PRIVATE, REALM_PUBLIC, ArtifactRef
from connito.wire.envelope import seal
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.sealing import NoKey
from connito.wire.subjects import LIBRARY

from services.committer.api import SubmissionApi
from tests.support.run import Run

ME, THIEF, COLLEAGUE = (Identity.generate(bytes([n]) * 32) for n in (1, 2, 3))
OPEN = ArtifactRef(digest="0" * 64, size=1, realm=REALM_PUBLIC)
MINE, *SHUT = (ArtifactRef(digest=d * 64, size=1, realm=REALM_PRIVATE, secret=d * 64) for d in "1234")
OTHERS, *_ = SHUT
# Sealed for others, gone, and sealed with a box that does not open, by whoever meant it.
WHY = dict(
    zip(
        (ref.digest for ref in SHUT),
        (NoKey("others'"), ObjectMissing("gone"), VerificationFailed("broken")),
        strict=True,
    )
)
# Secrets of others than whoever asks.
OWNERS: dict[str, str] = {}
REFS = {ref.digest: ref for ref in (OPEN, MINE, *SHUT)}


HOST: Any = SimpleNamespace(host=SimpleNamespace(now_ms=lambda: int(time.time() * 1000)))


class Store:
    async def get_bytes(self, ref: ArtifactRef) -> bytes:
        raise NotFound(ref.digest)

    async def stat(self, ref: ArtifactRef) -> int:
        return ref.size

    def presign_get(self, ref: ArtifactRef, seconds: int) -> str:
        return f"http://store/{ref.digest}"

    async def is_owner(self, secret: str, customer: str) -> bool:
        return customer == OWNERS.get(secret, ME.public)

    async def boxed_key(self, ref: ArtifactRef, reader: str) -> bytes:
        if ref.digest in WHY:
            raise WHY[ref.digest]
        return b"a box"


async def ask(*refs: ArtifactRef) -> services_pb2.RequestDownloadsResponse:
    async def entitled(facts: object, key: str) -> dict[str, ArtifactRef]:
        return REFS

    state: Any = SimpleNamespace(runs={}, roster=None, refresh=entitled)
    store: Any = Store()
    api = SubmissionApi(HOST, state, store, RateLimit(9, 9, time.monotonic), 60)
    api._downloads.entitled = entitled  # type: ignore[method-assign]
    command = services_pb2.DownloadsCommand(run=LIBRARY, digests=[ref.digest for ref in refs])
    request = services_pb2.RequestDownloadsRequest(envelope=seal(ME, "rpc.RequestDownloads", command))
    return await api.RequestDownloads(request, None)


async def test_what_the_committer_cannot_open_costs_nothing_that_is_asked_for_beside_it(tmp_path: Path) -> None:
    answer = await ask(OPEN, *SHUT, MINE)
    assert set(answer.urls) == set(REFS)
    assert dict(answer.keys) == {MINE.digest: b"a box"}
    with pytest.raises(NoKey, match="access lend"):
        await get_presigned(answer.urls[OTHERS.digest], OTHERS, tmp_path / "f", key=answer.keys[OTHERS.digest])


async def test_a_run_that_names_anothers_composition_opens_nothing_of_it() -> None:
    """Its digests stand in the log, and no run was there first: the run's customer was told the key."""
    composed = ArtifactRef(digest="c" * 64, size=5, realm=REALM_PRIVATE, secret="5" * 64)

    async def refresh(*_: object) -> None:
        """Know nothing newer."""

    runs: dict[str, RunFacts] = {}
    state = SimpleNamespace(
        runs=runs, refresh=refresh, roster=Roster({"customer": frozenset({ME.public, THIEF.public})}), naming=Naming()
    )
    deposits, stolen = Run(name=LIBRARY), Run(name="stolen", now=2_000_000)
    deposit = run_pb2.ExpertDeposited(
        run=LIBRARY, expert_id="x", expert=composed, owner=ME.public, visibility="private"
    )
    deposits.put("library", 0, "deposited", deposit, "x")
    corpus = run_pb2.CorpusRef(artifact=composed, domain="any")
    stolen.created(
        customer=THIEF.public, visibility="private", secret=ArtifactRef(digest=composed.secret), train=corpus
    )
    for run in (deposits, stolen):
        state.runs[run.name] = run.facts
        for fact in run.log:
            state.naming.add(fact)
    OWNERS[composed.secret] = ME.public
    with pytest.raises(Invalid, match="another customer's"):
        state.naming.check(stolen.facts.require_spec(), state.runs)

    async def get(key: Identity, run: str) -> dict[str, bytes]:
        api = SubmissionApi(HOST, cast(Any, state), cast(Any, Store()), RateLimit(9, 9, time.monotonic), 60)
        command = services_pb2.DownloadsCommand(run=run, digests=[composed.digest])
        request = services_pb2.RequestDownloadsRequest(envelope=seal(key, "rpc.RequestDownloads", command))
        return dict((await api.RequestDownloads(request, None)).keys)

    with pytest.raises(NotFound):
        await get(THIEF, "stolen")
    known, state.naming = state.naming, Naming()
    del state.runs[LIBRARY]
    for fact in stolen.log:
        state.naming.add(fact)
    assert await get(THIEF, "stolen") == {}, "nor where the deposit is not known yet"
    state.runs[LIBRARY], state.naming = deposits.facts, known
    assert await get(ME, LIBRARY) == {composed.digest: b"a box"}


async def test_what_the_run_gives_nobody_is_refused_by_name() -> None:
    with pytest.raises(NotFound, match="9999"):
        await ask(OPEN, ArtifactRef(digest="9" * 64))


async def test_a_composition_opens_for_whom_its_owner_lets_see_it_and_for_no_other_that_names_it() -> None:
    composed = ArtifactRef(digest="e" * 64, size=5, realm=REALM_PRIVATE, secret="6" * 64)
    keys = {"customer": frozenset({ME.public, COLLEAGUE.public, THIEF.public})}
    organisations = {"lab": frozenset({ME.public, COLLEAGUE.public})}
    deposits, naming = Run(name=LIBRARY), Naming()
    for expert, owner, visibility in (("mine", ME, "organisation"), ("taken", THIEF, "private")):
        said = run_pb2.ExpertDeposited(
            run=LIBRARY,
            expert_id=expert,
            expert=composed,
            owner=owner.public,
            visibility=visibility,
            organisation="lab",
        )
        deposits.put("library", 0, "deposited", said, expert)
    for fact in deposits.log:
        naming.add(fact)
    OWNERS[composed.secret] = ME.public

    async def refresh(*_: object) -> None:
        """Know nothing newer."""

    state = SimpleNamespace(
        runs={LIBRARY: deposits.facts}, refresh=refresh, roster=Roster(keys, organisations=organisations), naming=naming
    )

    async def get(key: Identity) -> dict[str, bytes]:
        api = SubmissionApi(HOST, cast(Any, state), cast(Any, Store()), RateLimit(9, 9, time.monotonic), 60)
        command = services_pb2.DownloadsCommand(run=LIBRARY, digests=[composed.digest])
        request = services_pb2.RequestDownloadsRequest(envelope=seal(key, "rpc.RequestDownloads", command))
        return dict((await api.RequestDownloads(request, None)).keys)

    assert await get(COLLEAGUE) == {composed.digest: b"a box"}
    with pytest.raises(NotFound):
        await get(THIEF)
