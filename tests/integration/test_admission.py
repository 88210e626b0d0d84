"""Enrolment policies, invites and bans: a coordinator and a committer as processes, a real broker and a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from connito.audit import access
from connito.bus import Bus
from connito.errors import Invalid, NotFound
from connito.platform.servers import NatsServer, ObjectStore
from connito.service import rpc
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC
from connito.v1.services_pb2_grpc import RunServiceStub
from connito.wire import invites
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from safetensors.numpy import save

from tests.integration import test_coordinator
from tests.integration.test_committer import STATE, Miner, trained
from tests.integration.test_committer import Stage as CommitterStage
from tests.integration.witness import ServiceProcess, Witness, guard

pytestmark = pytest.mark.integration

MINERS = [Identity.generate() for _ in range(4)]


@pytest.fixture(scope="module")
def people(keys: dict[str, Identity]) -> dict[str, Identity]:
    return {**keys, "operator": Identity.generate()}


@pytest.fixture(scope="module")
def installation(people: dict[str, Identity], roster: Roster) -> Roster:
    """The roster with an operator in it."""
    return Roster({**roster.keys, "operator": frozenset({people["operator"].public})})


class Api:
    """The coordinator's API as its callers use it."""

    def __init__(self, stub: RunServiceStub, people: dict[str, Identity]) -> None:
        self.stub, self.people = stub, people

    async def create(self, run: str, policy: run_pb2.EnrolmentPolicy) -> None:
        spec = test_coordinator.spec(run)
        spec.enrolment.CopyFrom(policy)
        spec.training.codec = "rows"  # which is what the played miners upload
        envelope = seal(self.people["customer"], "rpc.CreateRun", spec)
        await rpc.call(self.stub.CreateRun, services_pb2.CreateRunRequest(envelope=envelope))

    async def enrol(self, run: str, miner: Identity, token: str = "") -> None:
        command = services_pb2.EnrolMinerCommand(run=run)
        if token:
            command.invite.CopyFrom(invites.parse(token))
        envelope = seal(miner, "rpc.EnrolMiner", command)
        await rpc.call(self.stub.EnrolMiner, services_pb2.EnrolMinerRequest(envelope=envelope))

    async def ban(self, miner: Identity, run: str = "", by: str = "operator", *, lifted: bool = False) -> list[str]:
        order = run_pb2.BanOrder(run=run, miner=miner.public, why="floods", lifted=lifted)
        request = services_pb2.BanMinerRequest(envelope=seal(self.people[by], "rpc.BanMiner", order))
        return [*(await rpc.call(self.stub.BanMiner, request)).runs]

    def token(self, issuer: str, run: str = "", uses: int = 1, seconds: float = 60) -> str:
        until = int((time.time() + seconds) * 1000)
        invite = run_pb2.Invite(id=f"i{time.time_ns()}", run=run, uses=uses, expires_unix_ms=until)
        return invites.issue(self.people[issuer], invite)


async def refused(call: object, reason: int, match: str = ".") -> Invalid:
    with pytest.raises(Invalid, match=match) as caught:
        await call  # type: ignore[misc]
    assert caught.value.reason == reason
    return caught.value


@pytest.fixture
async def api(
    own_nats: NatsServer, people: dict[str, Identity], installation: Roster, tmp_path: Path
) -> AsyncIterator[Api]:
    await asyncio.to_thread(guard, own_nats, people, MINERS)
    env = {"CONNITO_NATS_URL": own_nats.url, "CONNITO_REQUESTS_BURST": "8", "CONNITO_REQUESTS_PER_SECOND": "0.01"}
    service = ServiceProcess("coordinator", tmp_path / "c", people["coordinator"], installation, env).start()
    try:
        await service.ready()
        async with rpc.channel(f"127.0.0.1:{service.ports['grpc']}") as channel:
            yield Api(RunServiceStub(channel), people)
    finally:
        service.kill()


async def test_allow_listed_and_invited_keys_get_in_and_no_others(api: Api, run_id: str) -> None:
    named, invited, stranger, late = MINERS
    await api.create(run_id, run_pb2.EnrolmentPolicy(mode="invite", allowed=[named.public], max_miners=3))
    await api.enrol(run_id, named)
    await refused(api.enrol(run_id, stranger), reasons_pb2.REASON_NOT_INVITED, "--invite")
    for bad, why in (
        (api.token("customer", "another"), "is for run 'another'"),
        (api.token("customer"), "signed by neither"),
        (api.token("miner", run_id), "signed by neither"),
        (api.token("operator", seconds=-1), "has expired"),
    ):
        await refused(api.enrol(run_id, stranger, bad), reasons_pb2.REASON_INVITE_INVALID, why)
    once = api.token("customer", run_id)
    await api.enrol(run_id, invited, once)
    await api.enrol(run_id, invited, once)  # again is fine
    await refused(api.enrol(run_id, late, once), reasons_pb2.REASON_INVITE_INVALID, "used up")
    await api.enrol(run_id, late, api.token("operator", uses=2))
    throttled = await refused(api.enrol(run_id, stranger, once), reasons_pb2.REASON_RUN_FULL)
    assert throttled.after == 0
    while throttled.reason == reasons_pb2.REASON_RUN_FULL:
        with pytest.raises(Invalid) as caught:
            await api.enrol(run_id, stranger, once)
        throttled = caught.value
    assert throttled.reason == reasons_pb2.REASON_QUOTA_EXCEEDED
    assert throttled.after > 10, "the hint says when to come back"


async def test_one_invite_is_not_used_twice_however_many_ask_at_once(api: Api, run_id: str) -> None:
    await api.create(run_id, run_pb2.EnrolmentPolicy(mode="invite"))
    token = api.token("operator", uses=2)
    outcomes = await asyncio.gather(*(api.enrol(run_id, miner, token) for miner in MINERS), return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 2
    assert all(outcome is None or isinstance(outcome, Invalid) for outcome in outcomes)


async def test_who_may_ban_and_where_it_stands(api: Api, run_id: str) -> None:
    one, two, _, _ = MINERS
    other = run_id + "-b"
    for run in (run_id, other):
        await api.create(run, run_pb2.EnrolmentPolicy())
        await api.enrol(run, one)
    await refused(api.ban(one, run_id, by="validator"), reasons_pb2.REASON_NOT_PERMITTED, "neither an operator")
    await refused(api.ban(one, by="customer"), reasons_pb2.REASON_NOT_PERMITTED)
    with pytest.raises(NotFound):
        await api.ban(one, "no-such-run")
    assert await api.ban(two, run_id, by="customer") == [run_id]
    await refused(api.enrol(run_id, two), reasons_pb2.REASON_BANNED, "floods")
    await api.enrol(other, two)
    assert await api.ban(one) == ["installation", *sorted((run_id, other))]
    assert await api.ban(one) == ["installation", *sorted((run_id, other))]  # again is fine
    await api.create(run_id + "-c", run_pb2.EnrolmentPolicy())
    await refused(api.enrol(run_id + "-c", one), reasons_pb2.REASON_BANNED)
    await api.ban(one, lifted=True)
    await api.enrol(run_id + "-c", one)


async def test_an_order_of_old_cannot_be_given_again(api: Api, run_id: str) -> None:
    """Orders stand in the log, where the banned key reads them too."""
    miner = MINERS[0]
    await api.create(run_id, run_pb2.EnrolmentPolicy())

    def signed(*, lifted: bool, ago_ms: int = 0) -> services_pb2.BanMinerRequest:
        order = run_pb2.BanOrder(run=run_id, miner=miner.public, why="floods", lifted=lifted)
        now_ms = time.time_ns() // 1_000_000 - ago_ms
        return services_pb2.BanMinerRequest(envelope=seal(api.people["operator"], "rpc.BanMiner", order, now_ms=now_ms))

    await rpc.call(api.stub.BanMiner, signed(lifted=False, ago_ms=3000))
    lift = signed(lifted=True, ago_ms=2000)
    await rpc.call(api.stub.BanMiner, lift)
    await rpc.call(api.stub.BanMiner, signed(lifted=False, ago_ms=1000))
    await refused(rpc.call(api.stub.BanMiner, lift), reasons_pb2.REASON_NOT_PERMITTED, "a later order")
    stale = rpc.call(api.stub.BanMiner, signed(lifted=True, ago_ms=3_600_000))
    await refused(stale, reasons_pb2.REASON_NOT_PERMITTED, "platform's clock")
    await refused(api.enrol(run_id, miner), reasons_pb2.REASON_BANNED, "floods")


async def test_a_ban_in_mid_cycle_takes_effect_at_once_and_holds_under_audit(
    own_nats: NatsServer,
    object_store: ObjectStore,
    store: ArtifactStore,
    people: dict[str, Identity],
    installation: Roster,
    api: Api,
    run_id: str,
    tmp_path: Path,
) -> None:
    """Coordinator and committer are the real ones: the miner's work was accepted, and then it is put out."""
    theta = await store.put_bytes(save(STATE), "application/octet-stream", REALM_PUBLIC)
    env = {
        "CONNITO_NATS_URL": own_nats.url,
        "CONNITO_S3_ENDPOINT": object_store.url,
        "CONNITO_S3_ACCESS_KEY": object_store.access_key,
        "CONNITO_S3_SECRET_KEY": object_store.secret_key,
        "CONNITO_S3_BUCKET": store.bucket,
    }
    committer = ServiceProcess("committer", tmp_path / "m", people["committer"], installation, env).start()
    names = ("selector", "validator", "operator", "committer")
    buses = {name: await Bus.connect(own_nats.url, people[name], name, installation) for name in names}
    bad, good = MINERS[:2]
    mining = {key: await Bus.connect(own_nats.url, key, "miner") for key in (bad, good)}
    try:
        await committer.ready()
        stage = CommitterStage(run_id, theta, store, buses["operator"], buses["selector"])
        miners = {key: Miner(stage, key, bus) for key, bus in mining.items()}
        async with Witness.reading(buses["operator"], installation, run_id) as witness:
            await api.create(run_id, run_pb2.EnrolmentPolicy(messages_per_cycle=3))
            await api.enrol(run_id, bad)
            await api.enrol(run_id, good)
            selected = run_pb2.SelectionMade(run=run_id, initial_state=theta)
            await buses["selector"].publish_fact(run_id, "run", 0, "selected", selected)
            validator = people["validator"].public
            joined = run_pb2.ValidatorJoined(run=run_id, validator=validator)
            await buses["validator"].publish_fact(run_id, "run", 0, "validator", joined, validator)
            await witness.has("train", 1, "opened")
            seed = cycle_pb2.SeedCommitted(run=run_id, cycle=1, validator=validator, digest=b"d" * 32)
            await buses["validator"].publish_fact(run_id, "train", 1, "seed", seed, validator)
            for bus in mining.values():
                await bus.publish_ingress(run_id, "trained", cycle_pb2.TrainingFinished(run=run_id, cycle=1))
            await witness.has("commit", 1, "opened")
            await miners[bad].commit(1, trained(0.01))
            flood = [await miners[bad].commit(1, trained(0.01)) for _ in range(6)]
            await mining[bad]._publish(f"connito.v1.{run_id}.ingress.{bad.public}.reveal", b"garbage", {}, "test")
            await miners[good].commit(1, trained(0.02))
            await witness.has("submit", 1, "opened")
            await miners[bad].upload(1, trained(0.01), tmp_path / "upload")
            revealed = await miners[bad].reveal(1, trained(0.01))
            await witness.has("submit", 1, "accepted", bad.public)

            await api.ban(bad)
            await refused(miners[bad].ask_upload(1, trained(0.01)), reasons_pb2.REASON_BANNED, "floods")
            await refused(miners[bad].urls(theta.digest), reasons_pb2.REASON_BANNED)
            again = await miners[bad].reveal(1, trained(0.01))
            await witness.has("submit", 1, "refused", f"{bad.public}-{again}")
            await miners[good].upload(1, trained(0.02), tmp_path / "upload")
            await miners[good].reveal(1, trained(0.02))
            facts = await witness.has("validate", 1, "opened")
    finally:
        committer.kill()
        for bus in (*buses.values(), *mining.values()):
            await bus.close()
    settled, closed = facts.window("submit", 1).settled, facts.window("submit", 1).closed
    assert settled is not None
    assert closed is not None
    assert [entry.miner for entry in settled.submissions] == [good.public]
    assert list(closed.banned) == [bad.public]
    refusals = {
        fact.message.ingress_sequence: fact.message.reason
        for window in ("commit", "submit")
        for fact in facts.window(window, 1).refused.values()
        if isinstance(fact.message, cycle_pb2.Refused) and fact.message.miner == bad.public
    }
    assert refusals == {
        flood[0]: reasons_pb2.REASON_DUPLICATE_COMMITMENT,
        flood[1]: reasons_pb2.REASON_DUPLICATE_COMMITMENT,
        flood[2]: reasons_pb2.REASON_QUOTA_EXCEEDED,
        again: reasons_pb2.REASON_BANNED,
        revealed: reasons_pb2.REASON_BANNED,
    }
    await _audit(own_nats, people["operator"], installation, store, run_id, tmp_path)


async def _audit(
    nats: NatsServer, operator: Identity, roster: Roster, store: ArtifactStore, run: str, folder: Path
) -> None:
    """The checks that need the log alone find nothing."""
    from connito.audit.admission import admission
    from connito.audit.audit import pure
    from connito.audit.evidence import signatures

    async with await Bus.connect(nats.url, operator, "audit", roster) as bus:
        evidence = await access.Access(bus, store, roster, folder).evidence(run)
    assert len(evidence.unreadable) == 1
    assert signatures(evidence).differences == ()
    assert admission(evidence).differences == ()
    wanted = ("windows", "commitments", "submissions")
    steps = {step.check: step for step in pure(evidence, 1) if step.check in wanted}
    assert {name: step.differences for name, step in steps.items()} == dict.fromkeys(wanted, ())
    assert steps["submissions"].compared == 4
