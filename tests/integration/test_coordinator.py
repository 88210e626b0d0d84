"""The coordinator as a process against a real broker; everyone else is played by the test."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
import pytest
from connito.bus import Bus, CaughtUp
from connito.bus.lease import LeaseKeeper
from connito.bus.position import PositionedLog
from connito.bus.streams import LEASE_TTL
from connito.errors import Invalid, NotFound
from connito.platform.servers import NatsServer
from connito.protocol.beacon import draw_seed, secret_digest
from connito.runtime.host import now_ms
from connito.runtime.tasks import end_tasks
from connito.service import rpc
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef, Realm
from connito.v1.envelope_pb2 import Envelope
from connito.v1.services_pb2_grpc import RunServiceStub
from connito.wire.envelope import seal
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.coordinator.actions import STREAMS, Coordinator
from tests.integration.witness import ServiceProcess, Witness, guard
from tests.support.run import enrolment
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.integration

THETA = ArtifactRef(digest="11" * 32, size=1000, realm=REALM_PUBLIC)
SECRET = b"r" * 32


def corpus(domain: str, realm: Realm.ValueType) -> run_pb2.CorpusRef:
    return run_pb2.CorpusRef(domain=domain, artifact=ArtifactRef(digest="ab" * 32, size=10, realm=realm))


def spec(run: str, cycles: int = 1, **windows: float) -> run_pb2.RunSpec:
    policy: dict[str, float] = {"floor_seconds": 20, "ceiling_seconds": 60, "assemble_seconds": 60} | windows
    return run_pb2.RunSpec(
        run=run,
        domain="medical",
        cycles=cycles,
        base=run_pb2.BaseRef(name="tiny", manifest=THETA),
        probe=corpus("medical", REALM_PUBLIC),
        train=corpus("medical", REALM_PUBLIC),
        holdout=corpus("medical", REALM_HOLDOUT),
        general_holdouts=[corpus("code", REALM_HOLDOUT)],
        windows=run_pb2.WindowPolicy(**policy),  # type: ignore[arg-type]
    )


class Stage:
    """A broker, the coordinator's API, and the other roles."""

    def __init__(self, bus: Bus, identities: dict[str, Identity], roster: Roster, buses: dict[str, Bus]) -> None:
        self.bus, self.identities, self.roster, self.buses = bus, identities, roster, buses

    @property
    def miner(self) -> Identity:
        return self.identities["miner"]

    def viewer(self) -> Envelope:
        """Who reads: the customer."""
        return seal(self.identities["customer"], "rpc.ReadRuns", services_pb2.ReadRunsCommand())

    async def stub(self) -> RunServiceStub:
        return RunServiceStub(rpc.channel(await self.bus.find_endpoint("coordinator")))

    async def create(self, asked: run_pb2.RunSpec) -> None:
        envelope = seal(self.identities["customer"], "rpc.CreateRun", asked)
        await rpc.call((await self.stub()).CreateRun, services_pb2.CreateRunRequest(envelope=envelope))

    async def enrol(self, run: str, identity: Identity | None = None, label: str = "m") -> run_pb2.RunSpec:
        command = services_pb2.EnrolMinerCommand(run=run, label=label)
        envelope = seal(identity or self.miner, "rpc.EnrolMiner", command)
        answer = await rpc.call((await self.stub()).EnrolMiner, services_pb2.EnrolMinerRequest(envelope=envelope))
        found: run_pb2.RunSpec = answer.spec
        return found

    async def cancel(self, run: str, who: str = "customer") -> None:
        envelope = seal(self.identities[who], "rpc.CancelRun", services_pb2.CancelRunCommand(run=run, detail="enough"))
        await rpc.call((await self.stub()).CancelRun, services_pb2.CancelRunRequest(envelope=envelope))

    async def status(self, run: str) -> services_pb2.RunStatus:
        request = services_pb2.GetRunRequest(run=run, viewer=self.viewer())
        answer = await rpc.call((await self.stub()).GetRun, request)
        found: services_pb2.RunStatus = answer.status
        return found

    async def assemble(self, run: str) -> None:
        """Selection, one miner, one validator."""
        validator = self.identities["validator"].public
        await self.buses["selector"].publish_fact(
            run, "run", 0, "selected", run_pb2.SelectionMade(run=run, initial_state=THETA)
        )
        await self.enrol(run)
        joined = run_pb2.ValidatorJoined(run=run, validator=validator)
        await self.buses["validator"].publish_fact(run, "run", 0, "validator", joined, validator)

    async def play(self, witness: Witness, run: str, cycle: int) -> None:
        """One whole cycle in which everybody does at once what is theirs."""
        miner, validator = self.miner.public, self.identities["validator"].public
        miner_bus, committer = self.buses["miner"], self.buses["committer"]
        validating, aggregator = self.buses["validator"], self.buses["aggregator"]
        await witness.has("train", cycle, "opened")
        await miner_bus.publish_ingress(run, "trained", cycle_pb2.TrainingFinished(run=run, cycle=cycle))
        digest = secret_digest(run, cycle, validator, SECRET)
        seed = cycle_pb2.SeedCommitted(run=run, cycle=cycle, validator=validator, digest=digest)
        await validating.publish_fact(run, "train", cycle, "seed", seed, validator)
        await witness.has("commit", cycle, "opened")
        sequence = await miner_bus.publish_ingress(
            run, "commitment", cycle_pb2.Commitment(run=run, cycle=cycle, digest=b"d" * 32)
        )
        accepted = cycle_pb2.CommitmentAccepted(run=run, cycle=cycle, miner=miner, ingress_sequence=sequence)
        await committer.publish_fact(run, "commit", cycle, "accepted", accepted, miner)
        closed = (await witness.has("commit", cycle, "closed")).window("commit", cycle).closed
        assert closed is not None
        assert (closed.stream, closed.cause) == ("INGRESS", cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
        assert closed.last_sequence >= sequence
        settled = cycle_pb2.WindowSettled(run=run, cycle=cycle, committed=[miner])
        await committer.publish_fact(run, "commit", cycle, "settled", settled)
        await witness.has("submit", cycle, "opened")
        submission = cycle_pb2.Submission(miner=miner, origin_cycle=cycle)
        revealed = cycle_pb2.RevealAccepted(run=run, cycle=cycle, submission=submission)
        await committer.publish_fact(run, "submit", cycle, "accepted", revealed, miner)
        await witness.has("submit", cycle, "closed")
        settled = cycle_pb2.WindowSettled(run=run, cycle=cycle, submissions=[submission])
        await committer.publish_fact(run, "submit", cycle, "settled", settled)
        await witness.has("validate", cycle, "opened")
        secret = cycle_pb2.SeedRevealed(run=run, cycle=cycle, validator=validator, secret=SECRET)
        await validating.publish_fact(run, "validate", cycle, "seed", secret, validator)
        drawn = (await witness.has("validate", cycle, "drawn")).drawn(cycle)
        assert drawn is not None
        assert drawn.seed == draw_seed(run, cycle, {validator: SECRET})
        report = cycle_pb2.ScoreReport(run=run, cycle=cycle, validator=validator, seed=drawn.seed)
        await validating.publish_fact(run, "validate", cycle, "report", report, validator)
        await witness.has("merge", cycle, "opened")
        version = cycle_pb2.VersionPublished(
            run=run, cycle=cycle, version=cycle, parent=cycle - 1, state=THETA, merged=[miner], weights=[1.0]
        )
        await aggregator.publish_fact(run, "merge", cycle, "version", version)
        await witness.has("merge", cycle, "closed")


@pytest.fixture
async def stage(own_nats: NatsServer, identities: dict[str, Identity], roster: Roster) -> AsyncIterator[Stage]:
    await asyncio.to_thread(guard, own_nats, identities)
    names = ("miner", "selector", "validator", "committer", "aggregator")
    buses = {name: await Bus.connect(own_nats.url, identities[name], name, roster) for name in names}
    yield Stage(buses["committer"], identities, roster, buses)
    for bus in buses.values():
        await bus.close()


Start = Callable[[str], ServiceProcess]


@pytest.fixture
def start(own_nats: NatsServer, identities: dict[str, Identity], roster: Roster, tmp_path: Path) -> Iterator[Start]:
    """`start(replica)` runs a coordinator; killed at the end."""
    started: list[ServiceProcess] = []

    def begin(replica: str) -> ServiceProcess:
        env = {"CONNITO_NATS_URL": own_nats.url}
        service = ServiceProcess("coordinator", tmp_path / replica, identities["coordinator"], roster, env)
        started.append(service.start())
        return service

    yield begin
    for service in started:
        service.kill()


async def test_a_run_from_creation_to_completion(stage: Stage, start: Start, run_id: str) -> None:
    service = await start("a").ready()
    stub: Any = await stage.stub()  # typed for blocking callers
    await stage.create(spec(run_id, cycles=2))
    await stage.create(spec(run_id, cycles=2))  # again is fine
    seen: list[services_pb2.RunStatus] = []

    first = asyncio.Event()

    async def watch() -> None:
        async for update in stub.WatchRun(services_pb2.WatchRunRequest(run=run_id, viewer=stage.viewer())):
            seen.append(update.status)
            first.set()

    watching = asyncio.create_task(watch())
    await asyncio.wait_for(first.wait(), PATIENCE)
    async with Witness.reading(stage.bus, stage.roster, run_id) as witness:
        await stage.assemble(run_id)
        for cycle in (1, 2):
            await stage.play(witness, run_id, cycle)
        facts = await witness.has("run", 0, "ended")
    assert facts.ended is not None
    assert (facts.ended.outcome, facts.ended.final_version) == (run_pb2.RUN_OUTCOME_COMPLETED, 2)
    await asyncio.wait_for(watching, PATIENCE)
    assert seen[0].phase == services_pb2.RUN_PHASE_SELECTING
    assert seen[-1].phase == services_pb2.RUN_PHASE_COMPLETED
    assert {"train", "commit", "submit", "validate", "merge"} <= {status.window for status in seen}
    assert (await stage.status(run_id)).version == 2
    listed = await rpc.call(stub.ListRuns, services_pb2.ListRunsRequest(viewer=stage.viewer()))
    assert [status.spec.run for status in listed.runs] == [run_id]
    assert_learned(facts)
    with pytest.raises(Invalid, match="has ended"):
        await stage.enrol(run_id, Identity.generate())
    with pytest.raises(Invalid, match="has ended"):
        await stage.cancel(run_id)
    assert service.drain() == 0


def writers(facts: RunFacts, *processes: ServiceProcess) -> list[ServiceProcess]:
    """Who opened and closed the run's windows, in order and each term once, as far as the processes' logs tell."""
    told = {
        (line["event"], line["cycle"]): process
        for process in processes
        for line in map(json.loads, process.log.read_text().splitlines())
        if line.get("run") == facts.run and "cycle" in line
    }
    written = [
        told.get((f"{window} {what}", cycle))
        for cycle in range(1, facts.cycle + 1)
        for window in ("train", "commit", "submit", "validate", "merge")
        for what in ("opened", "closed")
    ]
    # A process that was killed on the spot may not have logged its last one.
    return [process for process, _ in groupby(process for process in written if process is not None)]


def assert_learned(facts: RunFacts) -> None:
    """The second cycle's deadline comes from the first, which was far below the ceiling of a minute."""
    for window in ("train", "commit", "submit", "validate"):
        lengths = []
        for cycle in (1, 2):
            opened = facts.window(window, cycle).opened_fact
            assert opened is not None
            assert isinstance(opened.message, cycle_pb2.WindowOpened)
            lengths.append(opened.message.deadline_unix_ms - opened.time_unix_ms)
        assert lengths[0] > 55_000
        assert lengths[1] < 30_000


async def test_bad_requests_are_refused_clearly(stage: Stage, start: Start, run_id: str) -> None:
    await start("a").ready()
    with pytest.raises(Invalid, match="cycles is 0; ask for 1 to 1000") as caught:
        await stage.create(spec(run_id, cycles=0))
    assert caught.value.reason == reasons_pb2.REASON_BAD_SPEC
    await stage.create(spec(run_id))
    with pytest.raises(Invalid, match="choose another run id"):
        await stage.create(spec(run_id, cycles=7))
    stranger = seal(Identity.generate(), "rpc.CreateRun", spec("other"))
    with pytest.raises(Invalid, match="not a customer") as caught:
        await rpc.call((await stage.stub()).CreateRun, services_pb2.CreateRunRequest(envelope=stranger))
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED
    elsewhere = seal(stage.identities["customer"], "rpc.CancelRun", spec("other"))
    with pytest.raises(Invalid, match="signature"):
        await rpc.call((await stage.stub()).CreateRun, services_pb2.CreateRunRequest(envelope=elsewhere))
    with pytest.raises(NotFound, match="no run is called 'nothing'"):
        await stage.status("nothing")
    with pytest.raises(NotFound):
        await stage.enrol("nothing")
    with pytest.raises(Invalid, match="validator's"):
        await stage.enrol(run_id, stage.identities["validator"])
    with pytest.raises(Invalid, match="label"):
        await stage.enrol(run_id, label="x" * 200)
    stub: Any = await stage.stub()
    watching = stub.WatchRun(services_pb2.WatchRunRequest(run="nothing", viewer=stage.viewer()))
    with pytest.raises(grpc.aio.AioRpcError, match="no run is called 'nothing'"):
        await watching.read()


async def test_cancelling_ends_a_run_once(stage: Stage, start: Start, run_id: str) -> None:
    await start("a").ready()
    await stage.create(spec(run_id))
    await stage.assemble(run_id)
    async with Witness.reading(stage.bus, stage.roster, run_id) as witness:
        await witness.has("train", 1, "opened")
        await stage.cancel(run_id)
        await stage.cancel(run_id)
        facts = await witness.has("run", 0, "ended")
    assert facts.ended is not None
    assert facts.ended.outcome == run_pb2.RUN_OUTCOME_CANCELLED
    assert facts.ended.detail == "enough"
    assert (await stage.status(run_id)).phase == services_pb2.RUN_PHASE_CANCELLED


async def test_nobody_comes(stage: Stage, start: Start, run_id: str) -> None:
    await start("a").ready()
    await stage.create(spec(run_id, assemble_seconds=0.5, min_miners=2))
    selected = run_pb2.SelectionMade(run=run_id, initial_state=THETA)
    async with Witness.reading(stage.bus, stage.roster, run_id) as witness:
        await stage.buses["selector"].publish_fact(run_id, "run", 0, "selected", selected)
        facts = await witness.has("run", 0, "ended")
    assert facts.ended is not None
    assert facts.ended.reason == reasons_pb2.REASON_TOO_FEW_MINERS
    assert "0 of 2 miners" in facts.ended.detail


async def test_a_standby_takes_over_from_a_killed_leader_in_the_middle_of_a_cycle(
    stage: Stage, start: Start, run_id: str
) -> None:
    first = await start("a").ready()
    await stage.bus.find_endpoint("coordinator")
    second = await start("b").ready()
    await stage.create(spec(run_id))
    async with Witness.reading(stage.bus, stage.roster, run_id) as witness:
        await stage.assemble(run_id)
        facts = await witness.has("train", 1, "opened")
        # Its log is what tells who wrote; the fact is known before that line.
        await asyncio.to_thread(first.wait_for_log, "train opened")
        first.kill()
        await stage.play(witness, run_id, 1)
        facts = await witness.has("run", 0, "ended")
    assert facts.window("train", 1).opened is not None
    assert facts.window("merge", 1).opened is not None
    assert writers(facts, first, second) == [first, second], "the new leader wrote what followed"
    assert (await stage.bus.find_endpoint("coordinator")).endswith(f":{second.ports['grpc']}")
    assert (await stage.status(run_id)).phase == services_pb2.RUN_PHASE_COMPLETED


async def test_a_leader_that_stalls_loses_the_lease_and_can_lead_again(stage: Stage, start: Start, run_id: str) -> None:
    first = await start("a").ready()
    await stage.bus.find_endpoint("coordinator")
    second = await start("b").ready()
    await stage.create(spec(run_id, cycles=2))
    async with Witness.reading(stage.bus, stage.roster, run_id) as witness:
        await stage.assemble(run_id)
        await witness.has("train", 1, "opened")
        first.send(signal.SIGSTOP)
        await stage.play(witness, run_id, 1)
        await witness.has("train", 2, "opened")
        first.send(signal.SIGCONT)
        second.kill()
        await stage.play(witness, run_id, 2)
        facts = await witness.has("run", 0, "ended")
    assert first.process is not None
    assert first.process.poll() is None, "losing the lease does not end the process"
    for cycle in (1, 2):
        for window in ("train", "commit", "submit", "validate", "merge"):
            assert facts.window(window, cycle).opened is not None
            assert facts.window(window, cycle).closed is not None
    assert writers(facts, first, second) == [first, second, first]


async def test_a_broker_restart_in_the_middle_is_survived(
    stage: Stage, start: Start, own_nats: NatsServer, run_id: str
) -> None:
    await start("a").ready()
    await stage.create(spec(run_id))
    async with Witness.reading(stage.bus, stage.roster, run_id) as witness:
        await stage.assemble(run_id)
        await witness.has("train", 1, "opened")
        await asyncio.to_thread(own_nats.stop)
        await asyncio.to_thread(own_nats.start)
        await stage.play(witness, run_id, 1)
        await witness.has("run", 0, "ended")


async def test_health_is_told(stage: Stage, start: Start) -> None:
    await start("a").ready()
    channel = rpc.channel(await stage.bus.find_endpoint("coordinator"))
    request = health_pb2.HealthCheckRequest(service="connito.v1.RunService")
    answer = await rpc.call(health_pb2_grpc.HealthStub(channel).Check, request)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await channel.close(None)


async def test_what_was_decided_on_half_the_facts_is_decided_again_on_all_of_them(
    stage: Stage, own_nats: NatsServer, run_id: str
) -> None:
    """A leader whose INGRESS lags has seen train close and nobody train: it would open commit for nobody."""
    miner, coordinator = stage.miner.public, stage.identities["coordinator"]
    async with await Bus.connect(own_nats.url, coordinator, "coordinator", stage.roster) as bus:
        created = run_pb2.RunCreated(spec=spec(run_id))
        train: dict[str, Message] = {
            "opened": cycle_pb2.WindowOpened(run=run_id, cycle=1, window=cycle_pb2.WINDOW_TRAIN, expected=[miner]),
            "closed": cycle_pb2.WindowClosed(run=run_id, cycle=1, window=cycle_pb2.WINDOW_TRAIN, stream="INGRESS"),
        }
        await bus.publish_fact(run_id, "run", 0, "created", created)
        await bus.publish_fact(run_id, "run", 0, "miner", enrolment(run_id, stage.miner), miner)
        selected = run_pb2.SelectionMade(run=run_id, initial_state=THETA)
        await stage.buses["selector"].publish_fact(run_id, "run", 0, "selected", selected)
        trained = cycle_pb2.TrainingFinished(run=run_id, cycle=1)
        await stage.buses["miner"].publish_ingress(run_id, "trained", trained)
        for kind, message in train.items():
            await bus.publish_fact(run_id, "train", 1, kind, message)

        facts, held_back = PositionedLog(stage.roster), []
        async for item in bus.follow(STREAMS):
            if isinstance(item, CaughtUp):
                break
            if item.stream == "INGRESS":
                held_back.append(item)
            else:
                facts.apply(item)
        keeper, elected = LeaseKeeper(bus, "coordinator", LEASE_TTL), asyncio.Event()
        leader = Coordinator(bus, facts, lambda: keeper.leading, now_ms)

        async def begin() -> None:
            elected.set()

        leading = asyncio.create_task(keeper.keep(begin))
        await asyncio.wait_for(elected.wait(), PATIENCE)
        (premature,) = leader.decide(facts.runs[run_id], now_ms()).actions
        performing = asyncio.create_task(leader.perform(premature))
        for record in held_back:
            facts.apply(record)
        await performing
        await end_tasks([leading])
    assert list(premature.payload.message.expected) == []  # type: ignore[attr-defined]
    async with Witness.reading(stage.bus, stage.roster, run_id) as witness:
        written = (await witness.has("commit", 1, "opened")).window("commit", 1).opened
    assert written is not None
    assert list(written.expected) == [miner]
