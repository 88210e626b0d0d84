"""A miner who holds an invite and nothing else: from a token to the bus, and what the door does to everybody else.

The broker is configured by an operator's folder and never reloaded; the coordinator is a process that signs passes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from connito.bus import Bus
from connito.errors import ConnitoError, Invalid
from connito.platform.access import Access
from connito.platform.servers import NatsServer
from connito.service import rpc
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2, services_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.v1.services_pb2_grpc import RunServiceStub
from connito.wire import invites
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.integration import test_coordinator
from tests.integration.witness import ServiceProcess
from tests.support.desk import desk
from tests.support.waiting import declared

# The client library leaves sockets of refused logins to the garbage collector.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@dataclass
class House:
    """An installation by its operator's folder: a broker, and a coordinator that may sign miners' passes."""

    access: Access
    server: NatsServer
    stub: RunServiceStub
    api: str
    admission: Path
    opened: list[Bus] = field(default_factory=list)

    def key(self, name: str) -> Identity:
        return Identity.load(self.access.folder / "keys" / f"{name}.nk")

    def hand_over(self) -> None:
        """Give the coordinator what it admits with, as it is now: where it runs it has a copy, and no operator's seed."""
        for name in ("accounts.json", "accounts/miners-say.nk", "accounts/miners-read.nk"):
            (self.admission / name).parent.mkdir(parents=True, exist_ok=True)
            (self.admission / name).write_bytes((self.access.folder / name).read_bytes())

    def token(self, issuer: str = "operator", run: str = "", uses: int = 1, seconds: float = 60) -> str:
        until = int((time.time() + seconds) * 1000)
        invite = run_pb2.Invite(id=f"i{time.time_ns()}", run=run, uses=uses, expires_unix_ms=until, api=self.api)
        return invites.issue(self.key(issuer), invite)

    async def change(self, miner: Identity, token: str | Envelope) -> Identity:
        """Change an invite for passes."""
        envelope = invites.parse(token) if isinstance(token, str) else token
        asked = seal(miner, "rpc.AdmitMiner", services_pb2.AdmitMinerCommand(invite=envelope))
        answer = await rpc.call(self.stub.AdmitMiner, services_pb2.AdmitMinerRequest(envelope=asked))
        return miner.with_passes(tuple(answer.passes))

    async def bus(self, identity: Identity) -> Bus:
        self.opened.append(await Bus.connect(self.server.url, identity, "test", self.access.roster()))
        return self.opened[-1]

    async def create(self, run: str, mode: str = "open") -> None:
        spec = test_coordinator.spec(run)
        spec.enrolment.CopyFrom(run_pb2.EnrolmentPolicy(mode=mode))
        envelope = seal(self.key("customer"), "rpc.CreateRun", spec)
        await rpc.call(self.stub.CreateRun, services_pb2.CreateRunRequest(envelope=envelope))

    async def enrol(self, run: str, miner: Identity, token: str = "") -> None:
        command = services_pb2.EnrolMinerCommand(run=run)
        if token:
            command.invite.CopyFrom(invites.parse(token))
        envelope = seal(miner, "rpc.EnrolMiner", command)
        request = services_pb2.EnrolMinerRequest(envelope=envelope, admission=miner.passes[0])
        await rpc.call(self.stub.EnrolMiner, request)

    async def verb(self, *arguments: str, key: Path | None = None) -> dict[str, Any]:
        """Run `connito …` as somebody else would."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")}
        if key is not None:
            environment |= {
                "CONNITO_NATS_URL": self.server.url,
                "CONNITO_KEY_FILE": str(key),
                "CONNITO_ROSTER": str(self.access.folder / "roster.json"),
            }
        command = [sys.executable, "-m", "connito.cli", *arguments, "--json"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    access = Access(tmp_path / "secrets")
    access.export(validators=1)
    coordinator = Identity.load(access.folder / "keys" / "coordinator.nk")
    with NatsServer(tmp_path / "nats", accounts=access.accounts) as server:
        operator = Identity.load(access.folder / "keys" / "operator.nk")
        async with await Bus.connect(server.url, operator, "operator") as bus:
            await declared(bus.js)
        admission = tmp_path / "admission"
        env = {"CONNITO_NATS_URL": server.url, "CONNITO_ADMISSION": str(admission)}
        service = ServiceProcess("coordinator", tmp_path / "c", coordinator, access.roster(), env).start()
        try:
            await service.ready()
            address = f"127.0.0.1:{service.ports['grpc']}"
            async with rpc.channel(address) as channel:
                found = House(access, server, RunServiceStub(channel), address, admission)
                found.hand_over()
                async with desk(server.url, Identity.load(access.folder / "keys" / "committer.nk")):
                    yield found
                for one in found.opened:
                    with suppress(Exception):
                        await asyncio.wait_for(one.close(), 5)
        finally:
            service.kill()


async def refused(call: object, reason: int, match: str = ".") -> None:
    with pytest.raises(Invalid, match=match) as caught:
        await call  # type: ignore[misc]
    assert caught.value.reason == reason


async def test_a_token_is_all_that_a_miner_needs(house: House, tmp_path: Path, run_id: str) -> None:
    """By the commands that people type; and the broker is told nothing."""
    key = tmp_path / "guest" / "miner.nk"
    config = (house.access.folder / "nats.conf").read_bytes()
    token = (await house.verb("invite", key=house.access.folder / "keys" / "operator.nk"))["token"]
    await house.verb("miner", "init", "--key", str(key))
    told = await house.verb("miner", "join", token, "--key", str(key))
    guest = Identity.load(key)
    await house.create(run_id)
    await house.enrol(run_id, guest)
    bus = await Bus.connect(told["bus"], guest, "guest", Roster.load(Path(told["roster"])))
    house.opened.append(bus)
    await bus.publish_ingress(run_id, "trained", cycle_pb2.TrainingFinished(run=run_id, cycle=1))
    assert len([record async for record in bus.stored(["RUNS"], run_id)]) == 2
    assert (house.access.folder / "nats.conf").read_bytes() == config


async def test_from_the_token_to_the_first_word_takes_less_than_five_seconds(house: House, run_id: str) -> None:
    began = time.monotonic()
    bus = await house.bus(await house.change(Identity.generate(), house.token()))
    await bus.publish_ingress(run_id, "trained", cycle_pb2.TrainingFinished(run=run_id, cycle=1))
    took = time.monotonic() - began
    print(f"from the token to the first stored message: {took:.2f} s")
    assert took < 5.0


async def test_an_invite_is_for_as_many_keys_as_it_says(house: House, run_id: str) -> None:
    one, two, three = (Identity.generate() for _ in range(3))
    await house.create(run_id, "invite")
    twice = house.token("customer", run_id, uses=2)
    first = await house.change(one, twice)
    assert (await house.change(one, twice)).passes, "again is fine, for one whose passes are lost or void"
    second = await house.change(two, twice)
    await refused(house.change(three, twice), reasons_pb2.REASON_INVITE_INVALID, "used up")
    for miner in (first, second):
        await house.enrol(run_id, miner, twice)
        await house.bus(miner)
    rush = house.token(uses=3)
    asked = [house.change(Identity.generate(), rush) for _ in range(12)]
    outcomes = Counter(type(one) for one in await asyncio.gather(*asked, return_exceptions=True))
    assert outcomes == {Identity: 3, Invalid: 9}


async def test_what_is_no_invite_opens_nothing(house: House, run_id: str) -> None:
    await house.create(run_id, "invite")
    guest, stranger = Identity.generate(), Identity.generate()
    own = run_pb2.Invite(id="mine", uses=1, expires_unix_ms=1 << 60)
    forged = invites.parse(house.token())
    forged.payload = run_pb2.Invite(id="more", uses=9999, expires_unix_ms=1 << 60).SerializeToString()
    ended = run_id + "-e"
    await house.create(ended, "invite")
    late = house.token("customer", ended)
    cancel = seal(house.key("customer"), "rpc.CancelRun", services_pb2.CancelRunCommand(run=ended))
    await rpc.call(house.stub.CancelRun, services_pb2.CancelRunRequest(envelope=cancel))
    tries: dict[str, tuple[str | Envelope, str]] = {
        "one's own": (invites.issue(stranger, own), "signed by neither"),
        "a customer's, for everything": (house.token("customer"), "signed by neither"),
        "a validator's": (house.token("validator-1", run_id), "signed by neither"),
        "a run that does not exist": (house.token("customer", "nosuch"), "signed by neither"),
        "an operator's for a run that does not exist": (house.token("operator", "nosuch"), "not going on"),
        "a run that has ended": (late, "not going on"),
        "expired": (house.token(seconds=-1), "expired"),
        "changed": (forged, "does not verify"),
        "nothing": (Envelope(), "does not verify"),
        "noise": (Envelope(payload=b"\xff\xff"), "not an invite"),
    }
    for what, (token, why) in tries.items():
        with pytest.raises(Invalid, match=why) as caught:
            await house.change(guest, token)
        assert caught.value.reason == reasons_pb2.REASON_INVITE_INVALID, what
    await refused(house.change(house.key("validator-1"), house.token()), reasons_pb2.REASON_NOT_PERMITTED)
    asked = seal(guest, "rpc.EnrolMiner", services_pb2.AdmitMinerCommand(invite=invites.parse(house.token())))
    elsewhere = rpc.call(house.stub.AdmitMiner, services_pb2.AdmitMinerRequest(envelope=asked))
    await refused(elsewhere, reasons_pb2.REASON_BAD_SIGNATURE)


async def test_whom_the_operator_put_out_comes_back_with_no_invite(house: House) -> None:
    invited = house.token()
    banned, revoked = [await house.change(Identity.generate(), token) for token in (house.token(), invited)]
    order = run_pb2.BanOrder(miner=banned.public, why="floods")
    envelope = seal(house.key("operator"), "rpc.BanMiner", order)
    await rpc.call(house.stub.BanMiner, services_pb2.BanMinerRequest(envelope=envelope))
    await refused(house.change(banned, house.token()), reasons_pb2.REASON_BANNED, "floods")
    bus = await house.bus(revoked)
    house.access.revoke([revoked.public])
    await house.access.accounts.push(house.server.url)
    await until_cut_off(bus)
    await asyncio.sleep(1.0)  # Dates of passes and revocations are whole seconds: a pass of now would be a newer one.
    again = await house.change(revoked, invited)
    with pytest.raises(ConnitoError):
        await Bus.connect(house.server.url, again, "with the same invite, and the coordinator has not heard of it")
    house.hand_over()
    for token in (invited, house.token()):
        await refused(house.change(revoked, token), reasons_pb2.REASON_BANNED, "revoked")


async def test_an_address_that_knocks_without_end_is_not_heard(house: House) -> None:
    """Before a signature is checked; what others do goes on."""
    guest = await house.change(Identity.generate(), house.token())
    junk = services_pb2.AdmitMinerRequest(envelope=Envelope(payload=b"\xff" * 4000, signature=bytes(64)))
    outcomes: Counter[int] = Counter()
    for _ in range(300):
        with pytest.raises(Invalid) as caught:
            await rpc.call(house.stub.AdmitMiner, junk)
        outcomes[caught.value.reason] += 1
    assert outcomes[reasons_pb2.REASON_QUOTA_EXCEEDED] > 150
    assert caught.value.after > 0, "which says when to come back"
    await refused(house.change(Identity.generate(), house.token()), reasons_pb2.REASON_QUOTA_EXCEEDED)
    await house.create("still")
    await house.enrol("still", guest)


async def until_cut_off(bus: Bus) -> None:
    began = time.monotonic()
    while bus.connection.connected or bus._reading.connected:
        assert time.monotonic() - began < 2.0
        await asyncio.sleep(0.005)


async def test_a_ban_with_access_closes_the_broker_to_one_key(house: House) -> None:
    """`connito ban --access`: in two seconds from when the command says so, and nobody else notices."""
    folder = house.access.folder
    leaving, staying = [await house.change(Identity.generate(), house.token()) for _ in range(2)]
    gone, stays = await house.bus(leaving), await house.bus(staying)
    services = [await house.bus(house.key(name)) for name in ("committer", "validator-1", "customer")]
    arguments = ("ban", leaving.public, "--access", str(folder))
    await house.create("seen")
    await house.enrol("seen", leaving)
    done = await house.verb(*arguments, "--why", "floods", key=folder / "keys" / "operator.nk")
    assert done["broker"]
    await until_cut_off(gone)
    for bus in (stays, *services):
        assert bus.connected
        assert bus._reading.connected
    with pytest.raises(ConnitoError):
        await Bus.connect(house.server.url, leaving, "again")
    await stays.publish_ingress("seen", "trained", cycle_pb2.TrainingFinished(run="seen", cycle=1))

    await house.verb(*arguments, "--lift", key=folder / "keys" / "operator.nk")
    again = await house.change(leaving, house.token())
    await (await house.bus(again)).publish_ingress("seen", "trained", cycle_pb2.TrainingFinished(run="seen", cycle=1))


async def test_rotating_what_admits_voids_every_miners_pass_and_no_other(house: House) -> None:
    """`connito access rotate FOLDER miners`: who was added has a new pass in the folder, who was invited asks once more."""
    folder, invited = house.access.folder, house.token()
    guest = await house.change(Identity.generate(), invited)
    added = Identity.generate()
    added = added.with_passes(tuple(house.access.add([added.public])[added.public].split("~")))
    buses = [await house.bus(one) for one in (guest, added)]
    others = [await house.bus(house.key(name)) for name in ("committer", "validator-1", "customer", "operator")]
    told = await house.verb("access", "rotate", str(folder), "miners", "--bus", house.server.url)
    for bus in buses:
        await until_cut_off(bus)
    assert all(bus.connected and bus._reading.connected for bus in others)
    for old in (guest, added):
        with pytest.raises(ConnitoError):
            await Bus.connect(house.server.url, old, "with the old pass")
    assert set(told["passes"]) == {added.public}
    house.hand_over()
    renewed = added.with_passes(tuple(told["passes"][added.public].split("~")))
    for new in (renewed, await house.change(guest, invited)):
        await (await house.bus(new)).publish_ingress("r", "trained", cycle_pb2.TrainingFinished(run="r", cycle=1))
