"""Who reads runs at the API: signed, known, and no more than its share."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.errors import Invalid, NotFound
from connito.protocol import bans
from connito.v1 import reasons_pb2, run_pb2, services_pb2
from connito.wire import passes
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.invites import SUBJECT as INVITE_SUBJECT
from connito.wire.roster import Roster

from services.coordinator import reading
from services.coordinator.api import RunApi
from services.coordinator.state import State
from tests.support.run import Run

CUSTOMER, OTHER, VALIDATOR, MINER, STRANGER = (Identity.generate(bytes([n]) * 32) for n in range(1, 6))
ADMITS = passes.Authority.generate(passes.ACCOUNT)
COLLEAGUE = Identity.generate(bytes([9]) * 32)


class Door:
    """An installation with a public run, a private one and an organisation's, all of them one customer's."""

    def __init__(self) -> None:
        keys = {
            "customer": frozenset({CUSTOMER.public, OTHER.public, COLLEAGUE.public}),
            "validator": frozenset({VALIDATOR.public}),
        }
        roster = Roster(keys, organisations={"acme": frozenset({COLLEAGUE.public})}, admits={ADMITS.public})
        self.state = State(roster)
        for number, visibility in enumerate(("public", "private", "organisation"), 1):
            facts = Run().created(visibility=visibility).facts
            facts.run = facts.require_spec().run = visibility
            facts.require_spec().customer = CUSTOMER.public
            facts.require_spec().organisation = "acme" if visibility == "organisation" else ""
            assert facts.created_fact is not None
            object.__setattr__(facts.created_fact, "sequence", number)
            self.state.runs[visibility] = facts
        self.api = RunApi(cast(Bus, None), self.state, roster, self.state.changes)

    def signed(self, who: Identity, *, admitted: bool = False, ago_ms: int = 0) -> dict[str, Any]:
        now_ms = time.time_ns() // 1_000_000 - ago_ms
        token = ADMITS.sign(who.public, "miners-say", "user", {}, 1) if admitted else ""
        sealed = seal(who, "rpc.ReadRuns", services_pb2.ReadRunsCommand(), now_ms=now_ms)
        return {"viewer": sealed, "admission": token}

    async def shown(self, who: Identity, *, admitted: bool = False) -> list[str]:
        request = services_pb2.ListRunsRequest(**self.signed(who, admitted=admitted))
        return [status.spec.run for status in (await self.api.ListRuns(request, None)).runs]


@pytest.fixture
def door() -> Door:
    return Door()


async def test_what_is_shown_to_whom(door: Door) -> None:
    everything = ["public", "private", "organisation"]
    assert await door.shown(CUSTOMER) == everything
    assert await door.shown(VALIDATOR) == everything
    assert await door.shown(COLLEAGUE) == ["public", "organisation"]
    assert await door.shown(OTHER) == ["public"]
    assert await door.shown(MINER, admitted=True) == ["public"]
    door.state.runs["private"].require_spec().enrolment.allowed.append(MINER.public)
    assert await door.shown(MINER, admitted=True) == ["public", "private"]


async def test_a_run_that_is_not_shown_looks_like_none(door: Door) -> None:
    for run in ("private", "nosuch"):
        with pytest.raises(NotFound) as caught:
            await door.api.GetRun(services_pb2.GetRunRequest(run=run, **door.signed(OTHER)), None)
        assert str(caught.value) == f"no run is called {run!r}; `connito job list` shows them"
        with pytest.raises(NotFound):
            await anext(door.api.WatchRun(services_pb2.WatchRunRequest(run=run, **door.signed(OTHER)), None))


@pytest.mark.parametrize("run", ["private", "nosuch"])
async def test_nor_does_any_other_call_tell_that_there_is_one(door: Door, run: str) -> None:
    """Neither who asks to end it, to ban somebody or to take part learns more than that nothing is shown to it."""
    if run == "private":
        door.state.runs[run].require_spec().enrolment.mode = "invite"
    forged = run_pb2.Invite(run=run, uses=1, id="i", expires_unix_ms=1 << 60)
    commands = {
        "CancelRun": (
            seal(OTHER, "rpc.CancelRun", services_pb2.CancelRunCommand(run=run)),
            services_pb2.CancelRunRequest,
        ),
        "BanMiner": (
            seal(OTHER, bans.ORDER_SUBJECT, run_pb2.BanOrder(run=run, miner=MINER.public, why="w")),
            services_pb2.BanMinerRequest,
        ),
        "EnrolMiner": (
            seal(MINER, "rpc.EnrolMiner", services_pb2.EnrolMinerCommand(run=run)),
            services_pb2.EnrolMinerRequest,
        ),
        "EnrolMiner with a made-up invite": (
            seal(
                MINER,
                "rpc.EnrolMiner",
                services_pb2.EnrolMinerCommand(run=run, invite=seal(STRANGER, INVITE_SUBJECT, forged)),
            ),
            services_pb2.EnrolMinerRequest,
        ),
    }
    for name, (envelope, kind) in commands.items():
        request: Any = kind(envelope=envelope)
        if isinstance(request, services_pb2.EnrolMinerRequest):
            request.admission = ADMITS.sign(MINER.public, "miners-say", "user", {}, 1)
        with pytest.raises(NotFound) as caught:
            await getattr(door.api, name.split(maxsplit=1)[0])(request, None)
        assert str(caught.value) == f"no run is called {run!r}; `connito job list` shows them", name


async def test_who_sees_a_run_is_told_that_it_is_anothers(door: Door) -> None:
    envelope = seal(OTHER, "rpc.CancelRun", services_pb2.CancelRunCommand(run="public"))
    with pytest.raises(Invalid, match="belongs to another customer"):
        await door.api.CancelRun(services_pb2.CancelRunRequest(envelope=envelope), None)


async def test_who_is_not_known_or_did_not_sign_reads_nothing(door: Door) -> None:
    forged = services_pb2.ListRunsRequest(**door.signed(CUSTOMER))
    forged.viewer.signer = VALIDATOR.public
    foreign = services_pb2.ListRunsRequest(**door.signed(STRANGER))
    foreign.admission = ADMITS.sign(MINER.public, "miners-say", "user", {}, 1)
    elsewhere = services_pb2.ListRunsRequest()
    elsewhere.viewer.CopyFrom(seal(CUSTOMER, "rpc.ReadLibrary", services_pb2.ReadRunsCommand()))
    tries = {
        reasons_pb2.REASON_NOT_PERMITTED: [
            services_pb2.ListRunsRequest(**door.signed(STRANGER)),
            services_pb2.ListRunsRequest(**door.signed(CUSTOMER, ago_ms=3_600_000)),
            foreign,
        ],
        reasons_pb2.REASON_BAD_SIGNATURE: [forged, elsewhere],
    }
    for reason, requests in tries.items():
        for request in requests:
            with pytest.raises(Invalid) as caught:
                await door.api.ListRuns(request, None)
            assert caught.value.reason == reason
    with pytest.raises(Invalid):
        await door.api.ListRuns(services_pb2.ListRunsRequest(), None)


async def test_a_key_has_its_share_of_requests_and_streams(door: Door) -> None:
    watch = services_pb2.WatchRunRequest(run="public", **door.signed(CUSTOMER))
    streams = [door.api.WatchRun(watch, None) for _ in range(reading.STREAMS_PER_KEY)]
    for stream in streams:
        assert (await anext(stream)).status.spec.run == "public"
    with pytest.raises(Invalid, match="already") as caught:
        await anext(door.api.WatchRun(watch, None))
    assert caught.value.reason == reasons_pb2.REASON_QUOTA_EXCEEDED
    await anext(door.api.WatchRun(services_pb2.WatchRunRequest(run="public", **door.signed(OTHER)), None))
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    await anext(door.api.WatchRun(watch, None))
    request = services_pb2.ListRunsRequest(**door.signed(CUSTOMER))
    many = [door.api.ListRuns(request, None) for _ in range(int(2 * reading.READS_AT_ONCE))]
    refused = [one for one in await asyncio.gather(*many, return_exceptions=True) if isinstance(one, Invalid)]
    assert len(refused) > reading.READS_AT_ONCE / 2
    assert "too many requests" in str(refused[0])
    assert await door.shown(OTHER) == ["public"], "of each key"
