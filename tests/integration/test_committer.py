"""The committer as a process against a real broker and a real store; miners and coordinator are played by the test."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.bus import Bus
from connito.data.manifest import FileEntry, Manifest
from connito.errors import Invalid, NotFound
from connito.platform.servers import NatsServer, ObjectStore
from connito.protocol.commitment import commitment_digest
from connito.protocol.entitlement import base_proof
from connito.protocol.findings import PROTOCOL_VERSION
from connito.protocol.policy.law import number
from connito.service import rpc
from connito.service.customer_store import CustomerStore
from connito.store import ArtifactStore, get_presigned, put_presigned
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef
from connito.v1.services_pb2_grpc import SubmissionServiceStub
from connito.views.sentences import detail_of
from connito.wire import private
from connito.wire.envelope import open_bytes, seal
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.tls import PLAIN
from safetensors.numpy import save

from tests.integration.witness import ServiceProcess, Witness, guard
from tests.support.run import enrolment

pytestmark = pytest.mark.integration

SALT = b"s" * 32
STATE = {"layers.0.down_proj": np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 16, 16)}


def trained(step: float) -> bytes:
    """A submission: the state, moved a little."""
    data: bytes = save({name: value + np.float32(step) for name, value in STATE.items()})
    return data


class Miner:
    """What a trainer does, by hand."""

    def __init__(self, stage: Stage, identity: Identity, bus: Bus) -> None:
        self.stage, self.identity, self.bus = stage, identity, bus

    @property
    def key(self) -> str:
        return self.identity.public

    def made(self, data: bytes) -> ArtifactRef:
        return ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=len(data), realm=REALM_SUBMISSION)

    async def commit(self, cycle: int, data: bytes) -> int:
        run, base = self.stage.run, self.stage.theta.digest
        digest = commitment_digest(run, cycle, self.key, base, self.made(data).digest, SALT)
        return await self.bus.publish_ingress(
            run, "commitment", cycle_pb2.Commitment(run=run, cycle=cycle, digest=digest)
        )

    async def ask_upload(self, cycle: int, data: bytes) -> services_pb2.RequestUploadResponse:
        command = services_pb2.UploadCommand(
            run=self.stage.run,
            cycle=cycle,
            artifact=self.made(data),
            base_state_digest=self.stage.theta.digest,
            salt=SALT,
        )
        request = services_pb2.RequestUploadRequest(envelope=seal(self.identity, "rpc.RequestUpload", command))
        answer: services_pb2.RequestUploadResponse = await rpc.call((await self.stage.stub()).RequestUpload, request)
        return answer

    async def upload(self, cycle: int, data: bytes, path: Path) -> None:
        slot = await self.ask_upload(cycle, data)
        path.write_bytes(data)
        assert await put_presigned(slot.url, slot.headers, path)

    async def reveal(self, cycle: int, data: bytes) -> int:
        message = cycle_pb2.Reveal(
            run=self.stage.run,
            cycle=cycle,
            artifact=self.made(data),
            base_state_digest=self.stage.theta.digest,
            salt=SALT,
        )
        return await self.bus.publish_ingress(self.stage.run, "reveal", message)

    async def urls(self, *digests: str, run: str = "") -> dict[str, str]:
        command = services_pb2.DownloadsCommand(run=run or self.stage.run, digests=digests)
        request = services_pb2.RequestDownloadsRequest(envelope=seal(self.identity, "rpc.RequestDownloads", command))
        return dict((await rpc.call((await self.stage.stub()).RequestDownloads, request)).urls)


class Stage:
    """A run whose windows the test opens and closes."""

    def __init__(self, run: str, theta: ArtifactRef, store: ArtifactStore, coordinator: Bus, selector: Bus) -> None:
        self.run, self.theta, self.store = run, theta, store
        self.coordinator, self.selector = coordinator, selector

    async def stub(self) -> SubmissionServiceStub:
        return SubmissionServiceStub(rpc.channel(await self.coordinator.find_endpoint("committer")))

    async def begin(self, *miners: Miner) -> None:
        scoring = run_pb2.ScorePolicy(max_relative_norm=0.5)
        policy = run_pb2.EnrolmentPolicy(messages_per_cycle=int(number("enrolment.messages_per_cycle").default))
        spec = run_pb2.RunSpec(
            run=self.run, cycles=3, scoring=scoring, enrolment=policy, protocol_version=PROTOCOL_VERSION
        )
        created = run_pb2.RunCreated(spec=spec)
        await self.coordinator.publish_fact(self.run, "run", 0, "created", created)
        for miner in miners:
            enrolled = enrolment(self.run, miner.identity)
            await self.coordinator.publish_fact(self.run, "run", 0, "miner", enrolled, miner.key)
        selected = run_pb2.SelectionMade(run=self.run, initial_state=self.theta)
        await self.selector.publish_fact(self.run, "run", 0, "selected", selected)

    async def open(self, window: str, cycle: int) -> None:
        message = cycle_pb2.WindowOpened(run=self.run, cycle=cycle, state=self.theta)
        await self.coordinator.publish_fact(self.run, window, cycle, "opened", message)

    async def close(self, window: str, cycle: int, last: int | None = None) -> int:
        last = await self.coordinator.last_sequence("INGRESS") if last is None else last
        message = cycle_pb2.WindowClosed(run=self.run, cycle=cycle, stream="INGRESS", last_sequence=last)
        await self.coordinator.publish_fact(self.run, window, cycle, "closed", message)
        return last

    async def to_commit(self, cycle: int) -> None:
        await self.open("train", cycle)
        await self.open("commit", cycle)

    async def to_submit(self, witness: Witness, cycle: int) -> list[str]:
        await self.close("commit", cycle)
        settled = (await witness.has("commit", cycle, "settled")).window("commit", cycle).settled
        assert settled is not None
        await self.open("submit", cycle)
        return list(settled.committed)

    async def settle(self, witness: Witness, cycle: int, last: int | None = None) -> list[tuple[str, int]]:
        """Miner and origin of what will be scored."""
        last = await self.close("submit", cycle, last)
        settled = (await witness.has("submit", cycle, "settled")).window("submit", cycle).settled
        assert settled is not None
        assert settled.last_sequence == last
        return [(submission.miner, submission.origin_cycle) for submission in settled.submissions]


MakeMiner = Callable[[], Awaitable[Miner]]
Start = Callable[..., ServiceProcess]


# The broker knows its users before they come. The operator may do everything, so also what the broker keeps miners from.
MINERS = [Identity.generate() for _ in range(8)]
OPERATOR = Identity.generate()


@pytest.fixture
async def stage(
    own_nats: NatsServer, store: ArtifactStore, identities: dict[str, Identity], roster: Roster, run_id: str
) -> AsyncIterator[Stage]:
    identities["operator"] = OPERATOR
    await asyncio.to_thread(guard, own_nats, identities, MINERS)
    theta = await store.put_bytes(save(STATE), "application/octet-stream", REALM_PUBLIC)
    async with (
        await Bus.connect(own_nats.url, identities["coordinator"], "coordinator", roster) as coordinator,
        await Bus.connect(own_nats.url, identities["selector"], "selector", roster) as selector,
    ):
        yield Stage(run_id, theta, store, coordinator, selector)


@pytest.fixture
async def make_miner(own_nats: NatsServer, stage: Stage) -> AsyncIterator[MakeMiner]:
    buses: list[Bus] = []

    async def make() -> Miner:
        identity = MINERS[len(buses)]
        buses.append(await Bus.connect(own_nats.url, identity, "miner"))
        return Miner(stage, identity, buses[-1])

    yield make
    for bus in buses:
        await bus.close()


@pytest.fixture
async def witness(stage: Stage, roster: Roster) -> AsyncIterator[Witness]:
    async with Witness.reading(stage.coordinator, roster, stage.run) as reading:
        yield reading


@pytest.fixture
def start(
    own_nats: NatsServer,
    object_store: ObjectStore,
    store: ArtifactStore,
    identities: dict[str, Identity],
    roster: Roster,
    tmp_path: Path,
) -> Iterator[Start]:
    """`start(replica, **settings)` runs a committer; killed at the end."""
    started: list[ServiceProcess] = []
    env = {
        "CONNITO_NATS_URL": own_nats.url,
        "CONNITO_S3_ENDPOINT": object_store.url,
        "CONNITO_S3_ACCESS_KEY": object_store.access_key,
        "CONNITO_S3_SECRET_KEY": object_store.secret_key,
        "CONNITO_S3_BUCKET": store.bucket,
        "CONNITO_REQUESTS_BURST": "20",
        "CONNITO_REQUESTS_PER_SECOND": "0.001",
    }

    def begin(replica: str, **settings: str) -> ServiceProcess:
        service = ServiceProcess("committer", tmp_path / replica, identities["committer"], roster, env | settings)
        started.append(service.start())
        return service

    yield begin
    for service in started:
        service.kill()


def refusal(facts: RunFacts, window: str, cycle: int, miner: Miner, sequence: int) -> int:
    refused = facts.window(window, cycle).refusal(miner.key, sequence)
    assert refused is not None
    assert detail_of(refused)
    return refused.reason


async def test_a_whole_cycle_and_a_late_reveal_that_rolls_over(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner, tmp_path: Path
) -> None:
    service = await start("a").ready()
    honest, slow, silent = [await make_miner() for _ in range(3)]
    await stage.begin(honest, slow, silent)
    await stage.to_commit(1)
    for miner, step in ((slow, 0.02), (honest, 0.01), (silent, 0.03)):
        await miner.commit(1, trained(step))
    assert await stage.to_submit(witness, 1) == sorted([honest.key, slow.key, silent.key])
    await honest.upload(1, trained(0.01), tmp_path / "honest")
    assert (await honest.ask_upload(1, trained(0.01))).present
    await honest.reveal(1, trained(0.01))
    facts = await witness.has("submit", 1, "accepted", honest.key)
    accepted = facts.reveal(1, honest.key)
    assert accepted is not None
    assert await stage.store.get_bytes(accepted.submission.artifact) == trained(0.01)
    assert await stage.settle(witness, 1) == [(honest.key, 1)]
    assert refusal(witness.facts, "submit", 1, silent, 0) == reasons_pb2.REASON_NOT_REVEALED
    assert refusal(witness.facts, "submit", 1, slow, 0) == reasons_pb2.REASON_NOT_REVEALED

    # The slow miner uploads and reveals after the close.
    await slow.upload(1, trained(0.02), tmp_path / "slow")
    late = await slow.reveal(1, trained(0.02))
    facts = await witness.has("submit", 1, "refused", f"{slow.key}-{late}")
    assert refusal(facts, "submit", 1, slow, late) == reasons_pb2.REASON_LATE_REVEAL
    await stage.to_commit(2)
    await honest.commit(2, trained(0.04))
    await stage.to_submit(witness, 2)
    await honest.upload(2, trained(0.04), tmp_path / "honest2")
    await honest.reveal(2, trained(0.04))
    assert await stage.settle(witness, 2) == [(slow.key, 1), (honest.key, 2)]
    assert service.drain() == 0


async def test_commitments_count_by_sequence_although_they_are_handled_after_the_close(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner
) -> None:
    early, tardy = await make_miner(), await make_miner()
    await stage.begin(early, tardy)
    await stage.to_commit(1)
    await early.commit(1, trained(0.01))
    twice = await early.commit(1, trained(0.02))
    last = await stage.close("commit", 1)
    late = await tardy.commit(1, trained(0.03))
    assert late > last
    await start("a").ready()
    facts = await witness.has("commit", 1, "settled")
    settled = facts.window("commit", 1).settled
    assert settled is not None
    assert list(settled.committed) == [early.key]
    facts = await witness.has("commit", 1, "refused", f"{tardy.key}-{late}")
    assert refusal(facts, "commit", 1, tardy, late) == reasons_pb2.REASON_LATE_COMMITMENT
    assert refusal(facts, "commit", 1, early, twice) == reasons_pb2.REASON_DUPLICATE_COMMITMENT


async def test_a_close_that_excludes_what_was_accepted_before_it_was_known(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner
) -> None:
    await start("a").ready()
    first, second = await make_miner(), await make_miner()
    await stage.begin(first, second)
    await stage.to_commit(1)
    inside = await first.commit(1, trained(0.01))
    outside = await second.commit(1, trained(0.02))
    await witness.has("commit", 1, "accepted", second.key)
    await stage.close("commit", 1, last=inside)
    facts = await witness.has("commit", 1, "settled")
    settled = facts.window("commit", 1).settled
    assert settled is not None
    assert list(settled.committed) == [first.key]
    assert refusal(facts, "commit", 1, second, outside) == reasons_pb2.REASON_LATE_COMMITMENT


async def test_bad_reveals_are_refused_and_may_be_mended(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner, tmp_path: Path
) -> None:
    await start("a").ready()
    names = ("forgetful", "nan", "huge", "shape", "liar")
    miners = {name: await make_miner() for name in names}
    moved = STATE["layers.0.down_proj"]
    broken = moved.copy()
    broken[0, 0, 0] = np.nan
    data = {
        "forgetful": trained(0.01),
        "nan": save({"layers.0.down_proj": broken}),
        "huge": save({"layers.0.down_proj": moved * 3}),
        "shape": save({"layers.0.down_proj": moved.reshape(2, 8, 32)}),
        "liar": trained(0.05),
    }
    await stage.begin(*miners.values())
    await stage.to_commit(1)
    for name, miner in miners.items():
        await miner.commit(1, data[name])
    await stage.to_submit(witness, 1)
    expected = {
        "forgetful": reasons_pb2.REASON_ARTIFACT_MISSING,
        "nan": reasons_pb2.REASON_NON_FINITE,
        "huge": reasons_pb2.REASON_NORM_EXCEEDED,
        "shape": reasons_pb2.REASON_WRONG_SHAPE,
        "liar": reasons_pb2.REASON_COMMITMENT_MISMATCH,
    }
    for name in ("nan", "huge", "shape"):
        await miners[name].upload(1, data[name], tmp_path / name)
    data["liar"] = trained(0.06)
    with pytest.raises(Invalid, match="do not open your commitment"):
        await miners["liar"].ask_upload(1, data["liar"])
    for name, miner in miners.items():
        sequence = await miner.reveal(1, data[name])
        facts = await witness.has("submit", 1, "refused", f"{miner.key}-{sequence}")
        assert refusal(facts, "submit", 1, miner, sequence) == expected[name], name

    mended = miners["forgetful"]
    await mended.upload(1, data["forgetful"], tmp_path / "forgetful")
    await mended.reveal(1, data["forgetful"])
    await witness.has("submit", 1, "accepted", mended.key)
    again = await mended.reveal(1, data["forgetful"])
    facts = await witness.has("submit", 1, "refused", f"{mended.key}-{again}")
    assert refusal(facts, "submit", 1, mended, again) == reasons_pb2.REASON_DUPLICATE_REVEAL
    assert await stage.settle(witness, 1) == [(mended.key, 1)]


async def test_killed_between_everything_nothing_is_lost_or_done_twice(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner, tmp_path: Path
) -> None:
    service = await start("a").ready()
    miners = [await make_miner() for _ in range(6)]
    await stage.begin(*miners)
    await stage.to_commit(1)
    for index, miner in enumerate(miners):
        await miner.commit(1, trained(0.01 * index))
        if index in (1, 3):
            service.kill()
            service.start()
    await service.ready()
    assert await stage.to_submit(witness, 1) == sorted(miner.key for miner in miners)
    for index, miner in enumerate(miners):
        await miner.upload(1, trained(0.01 * index), tmp_path / str(index))
        await miner.reveal(1, trained(0.01 * index))
    service.kill()
    last = await stage.close("submit", 1)
    service.start()
    assert await stage.settle(witness, 1, last) == [(miner.key, 1) for miner in miners]
    assert witness.facts.window("commit", 1).refused == {}
    assert witness.facts.window("submit", 1).refused == {}


async def test_what_nobody_can_be_answered_about_goes_to_the_dead_letters(
    stage: Stage,
    witness: Witness,
    start: Start,
    make_miner: MakeMiner,
    own_nats: NatsServer,
    identities: dict[str, Identity],
) -> None:
    await start("a").ready()
    good, outsider = await make_miner(), await make_miner()
    await stage.begin(good)
    await stage.to_commit(1)
    subject = f"connito.v1.{stage.run}.ingress.{good.key}.commitment"
    forged = seal(outsider.identity, subject, cycle_pb2.Commitment(run=stage.run, cycle=1, digest=b"d" * 32))
    async with await Bus.connect(own_nats.url, identities["operator"], "operator") as careless:
        await careless.js.publish(subject, forged.SerializeToString())
        await careless.js.publish(subject, b"\xff not an envelope")
    unknown = cycle_pb2.Commitment(run="no-such-run", cycle=1, digest=b"d" * 32)
    await outsider.bus.publish_ingress("no-such-run", "commitment", unknown)
    uninvited = await outsider.commit(1, trained(0.01))
    await good.commit(1, trained(0.01))
    assert await stage.to_submit(witness, 1) == [good.key]
    assert refusal(witness.facts, "commit", 1, outsider, uninvited) == reasons_pb2.REASON_NOT_ENROLLED
    letters = []
    async with await Bus.connect(own_nats.url, identities["operator"], "operator") as reader:
        for sequence in (1, 2, 3):
            record = await reader.last_record(f"connito.dlq.v1.INGRESS.{sequence}")
            assert record is not None
            letters.append(open_bytes(record.data, record.subject).read(cycle_pb2.DeadLetter))
    assert [letter.reason for letter in letters] == [
        reasons_pb2.REASON_NOT_PERMITTED,
        reasons_pb2.REASON_MALFORMED,
        reasons_pb2.REASON_UNKNOWN_RUN,
    ]


async def test_downloads_are_for_the_enrolled_and_of_what_their_run_names_only(
    stage: Stage, start: Start, make_miner: MakeMiner, tmp_path: Path
) -> None:
    await start("a").ready()
    miner, stranger = await make_miner(), await make_miner()
    await stage.begin(miner)
    held_out = await stage.store.put_bytes(b"held out", "text/plain", REALM_HOLDOUT)
    submitted = await stage.store.put_bytes(b"another's", "text/plain", REALM_SUBMISSION)
    urls = await miner.urls(stage.theta.digest)
    await get_presigned(urls[stage.theta.digest], stage.theta, tmp_path / "theta")
    assert (tmp_path / "theta").read_bytes() == save(STATE)
    public = await stage.store.put_bytes(b"of nobody's run", "text/plain", REALM_PUBLIC)
    for digest in (held_out.digest, submitted.digest, public.digest, "0" * 64, "../../holdout/sha256/" + "0" * 40):
        with pytest.raises(NotFound, match="gives you no artifact"):
            await miner.urls(digest)
    with pytest.raises(Invalid, match="over the limit of 64"):
        await miner.urls("../../holdout/sha256/" + held_out.digest)
    with pytest.raises(Invalid, match="not enrolled") as caught:
        await stranger.urls(stage.theta.digest)
    assert caught.value.reason == reasons_pb2.REASON_NOT_ENROLLED
    with pytest.raises(Invalid, match="over the limit of 256"):
        await miner.urls(*["0" * 64] * 300)
    refused = [error for error in [await attempt(miner, stage.theta.digest) for _ in range(30)] if error is not None]
    assert {error.reason for error in refused} == {reasons_pb2.REASON_QUOTA_EXCEEDED}


async def test_a_run_opens_nothing_of_another_customers(
    stage: Stage,
    start: Start,
    make_miner: MakeMiner,
    identities: dict[str, Identity],
    own_nats: NatsServer,
    roster: Roster,
) -> None:
    """Everybody reads the digests of a private run in the log: neither asking for them nor naming them is a right."""
    await start("a", CONNITO_REQUESTS_BURST="100").ready()
    miner, rival, store = await make_miner(), await make_miner(), stage.store
    clinic, mallory = Identity.generate(b"clinic".ljust(32)), Identity.generate(b"mallory".ljust(32))
    weights = await store.put_bytes(b"weights of the clinic", "text/plain", REALM_PUBLIC)
    entry = FileEntry("config.json", weights.digest, weights.size, "application/json")
    raw = Manifest({"config.json": entry}, {}, "clinic").to_bytes()
    manifest = await store.put_bytes(raw, "application/json", REALM_PUBLIC)
    train = await store.put_bytes(b"records of patients", "text/plain", REALM_PUBLIC)
    expert = await store.put_bytes(b"the expert that came out", "text/plain", REALM_PUBLIC)

    async def create(run: str, customer: Identity, proof: bytes = b"", **fields: Any) -> None:
        base = run_pb2.BaseRef(name=run, manifest=manifest, proof=proof)
        spec = run_pb2.RunSpec(
            run=run, cycles=1, customer=customer.public, base=base, protocol_version=PROTOCOL_VERSION, **fields
        )
        await stage.coordinator.publish_fact(run, "run", 0, "created", run_pb2.RunCreated(spec=spec))
        who = miner if customer is mallory else rival
        await stage.coordinator.publish_fact(run, "run", 0, "miner", enrolment(run, who.identity), who.key)

    text = run_pb2.CorpusRef(domain="d", artifact=train)
    await create("clinic", clinic, visibility="private", train=text)
    async with await Bus.connect(own_nats.url, identities["library"], "library", roster) as library:
        deposited = run_pb2.ExpertDeposited(run="clinic", expert_id="e", expert=expert, record=expert)
        await library.publish_fact("clinic", "library", 0, "deposited", deposited, "e")
    await create("open", mallory)
    await create("naming", mallory, train=text, replay=run_pb2.CorpusRef(domain="d", artifact=expert))
    for ref in (train, expert, manifest, weights):
        for run in ("open", "naming"):
            with pytest.raises(NotFound, match="gives you no artifact"):
                await miner.urls(ref.digest, run=run)
    assert set(await rival.urls(train.digest, manifest.digest, weights.digest, run="clinic"))
    with pytest.raises(NotFound, match="no run is called"):
        await miner.urls(train.digest, run="clinic")
    with pytest.raises(NotFound, match="gives you no artifact"):
        await rival.urls(expert.digest, run="clinic")
    await create("proven", mallory, base_proof(mallory.public, raw))
    assert set(await miner.urls(manifest.digest, weights.digest, run="proven")), "who has the base may bring it too"
    await create("borrowed", mallory, base_proof(clinic.public, raw))
    with pytest.raises(NotFound, match="gives you no artifact"):
        await miner.urls(manifest.digest, run="borrowed")
    customer = Miner(stage, clinic, miner.bus)
    assert set(await customer.urls(train.digest, expert.digest, run="clinic"))
    with pytest.raises(Invalid, match="not enrolled"):
        await customer.urls(train.digest, run="naming")


async def test_a_customer_uploads_and_downloads_with_its_key_alone(
    stage: Stage, start: Start, roster: Roster, identities: dict[str, Identity], own_nats: NatsServer, tmp_path: Path
) -> None:
    await start("a").ready()
    operators, text, raw = roster, tmp_path / "text", b"held-out text of a clinic"
    text.write_bytes(raw)

    def store_of(name: str) -> CustomerStore:
        key = identities[name] if name in identities else Identity.generate()
        folder = tmp_path / name

        class Platform:
            identity, tls, cache_dir = key, PLAIN, folder
            roster = operators

            def direct(self) -> None:
                """Its services run."""

            async def endpoints(self, *names: str) -> dict[str, str]:
                return {name: await stage.coordinator.find_endpoint(name) for name in names}

        return CustomerStore(Platform())

    mine = store_of("customer")
    ref = await mine.put_file(text, "text/plain", REALM_HOLDOUT)
    assert await stage.store.get_bytes(ref) == raw
    assert await mine.put_file(text, "text/plain", REALM_HOLDOUT) == ref, "again is fine"
    assert (await mine.stat(ref), await mine.stat(ArtifactRef(digest="0" * 64, size=5, realm=REALM_PUBLIC))) == (
        25,
        None,
    )
    with pytest.raises(Invalid, match="is a customer's"):
        await mine.put_file(text, "text/plain", REALM_SUBMISSION)
    for stranger in ("validator", "nobody"):
        with pytest.raises(Invalid, match="is a customer's"):
            await store_of(stranger).put_file(text, "text/plain", REALM_HOLDOUT)
    # A secret that nobody has stored is nobody's, and one that is no sealed file either.
    for made_up in ("d" * 64, (await mine.put_file(text, "text/plain", REALM_PUBLIC)).digest):
        mine._secrets[made_up] = bytes(32)
        with pytest.raises(Invalid):
            await mine.put_file(text, "text/plain", private.at(made_up))
    place = private.at((await mine.secret("mine")).digest)
    assert (await mine.put_file(text, "text/plain", place)).secret == place.secret
    spec = run_pb2.RunSpec(
        run="mine", customer=identities["customer"].public, visibility="private", protocol_version=PROTOCOL_VERSION
    )
    spec.holdout.artifact.CopyFrom(ref)
    await stage.coordinator.publish_fact("mine", "run", 0, "created", run_pb2.RunCreated(spec=spec))
    assert (await mine.fetch(ref, "mine")).read_bytes() == raw
    with pytest.raises(NotFound, match="no run is called"):
        await store_of("nobody").fetch(ref, "mine")


async def attempt(miner: Miner, digest: str) -> Invalid | None:
    try:
        await miner.urls(digest)
    except Invalid as error:
        return error
    return None


async def test_two_committers_share_the_work_and_agree(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner
) -> None:
    first, second = await start("a").ready(), await start("b").ready()
    miners = [await make_miner() for _ in range(8)]
    await stage.begin(*miners)
    await stage.to_commit(1)
    for miner in miners:
        await miner.commit(1, trained(0.01))
        await miner.commit(1, trained(0.02))
    assert await stage.to_submit(witness, 1) == sorted(miner.key for miner in miners)
    sequences = []
    for miner in miners:
        accepted = witness.facts.commitment(1, miner.key)
        assert accepted is not None
        sequences.append(accepted.ingress_sequence)
    assert sequences == [1 + 2 * index for index in range(8)], "the first of two commitments stands"
    for service in (first, second):
        assert service.drain() == 0


async def test_while_the_store_is_away_a_reveal_waits_and_nobody_is_blamed(
    stage: Stage,
    witness: Witness,
    start: Start,
    make_miner: MakeMiner,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with ObjectStore(tmp_path_factory.mktemp("weed")) as other:
        stage.store = ArtifactStore(
            other.url, other.access_key, other.secret_key, "connito", "us-east-1", tmp_path / "other-cache"
        )
        await stage.store.ensure_bucket()
        stage.theta = await stage.store.put_bytes(save(STATE), "application/octet-stream", REALM_PUBLIC)
        service = start("a", CONNITO_S3_ENDPOINT=other.url, CONNITO_S3_BUCKET="connito")
        await service.ready()
        miner = await make_miner()
        await stage.begin(miner)
        await stage.to_commit(1)
        await miner.commit(1, trained(0.01))
        await stage.to_submit(witness, 1)
        await miner.upload(1, trained(0.01), tmp_path / "upload")
        await asyncio.to_thread(other.kill)
        await miner.reveal(1, trained(0.01))
        last = await stage.close("submit", 1)
        await asyncio.to_thread(service.wait_for_log, "is away")
        assert witness.facts.window("submit", 1).settled is None
        await asyncio.to_thread(other.start)
        assert await stage.settle(witness, 1, last) == [(miner.key, 1)]
        assert witness.facts.window("submit", 1).refused == {}


async def test_killed_after_the_dead_letter_and_before_the_end_of_its_message(
    stage: Stage,
    witness: Witness,
    start: Start,
    make_miner: MakeMiner,
    own_nats: NatsServer,
    identities: dict[str, Identity],
) -> None:
    miner = await make_miner()
    await stage.begin(miner)
    await stage.to_commit(1)
    async with await Bus.connect(own_nats.url, identities["operator"], "operator") as careless:
        await careless.js.publish(f"connito.v1.{stage.run}.ingress.{miner.key}.commitment", b"\xff not an envelope")
        subject = "connito.dlq.v1.INGRESS.1"
        letter = cycle_pb2.DeadLetter(stream="INGRESS", sequence=1, reason=reasons_pb2.REASON_MALFORMED)
        await careless.js.publish(subject, seal(identities["committer"], subject, letter).SerializeToString())
    await start("a").ready()
    await miner.commit(1, trained(0.01))
    assert await stage.to_submit(witness, 1) == [miner.key]


async def test_a_missing_object_of_one_run_delays_no_other_run(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner, roster: Roster, tmp_path: Path
) -> None:
    """A reveal that waits for what its run has lost is behind nobody, and is judged when the object is back."""
    await start("a").ready()
    lost = save({name: value * 2 for name, value in STATE.items()})
    ours, theirs = await make_miner(), await make_miner()
    other = Stage(f"{stage.run}-other", stage.theta, stage.store, stage.coordinator, stage.selector)
    theirs.stage = other
    stage.theta = ArtifactRef(digest=hashlib.sha256(lost).hexdigest(), size=len(lost), realm=REALM_PUBLIC)
    await stage.begin(ours)
    await stage.to_commit(1)
    work = save({name: value * 2 + np.float32(0.01) for name, value in STATE.items()})
    await ours.commit(1, work)
    await stage.to_submit(witness, 1)
    await ours.upload(1, work, tmp_path / "work")
    await ours.reveal(1, work)
    last = await stage.close("submit", 1)
    async with Witness.reading(stage.coordinator, roster, other.run) as beside:
        await other.begin(theirs)
        await other.to_commit(1)
        await theirs.commit(1, trained(0.01))
        assert await other.to_submit(beside, 1) == [theirs.key]
        await theirs.upload(1, trained(0.01), tmp_path / "theirs")
        await theirs.reveal(1, trained(0.01))
        assert await other.settle(beside, 1) == [(theirs.key, 1)]
    assert witness.facts.window("submit", 1).settled is None, "it waits, and nobody is blamed"
    assert witness.facts.window("submit", 1).refused == {}
    await stage.store.put_bytes(lost, "application/octet-stream", REALM_PUBLIC)
    assert await stage.settle(witness, 1, last) == [(ours.key, 1)]


async def test_a_committer_that_starts_again_goes_on_with_what_it_kept(
    stage: Stage, witness: Witness, start: Start, make_miner: MakeMiner, tmp_path: Path
) -> None:
    """Killed between windows, with its state: every answer is the one that it would have given."""
    state = {"CONNITO_STATE_DIR": str(tmp_path / "state")}
    service = await start("a", **state).ready()
    miner, late = await make_miner(), await make_miner()
    await stage.begin(miner, late)
    for cycle in (1, 2):
        await stage.to_commit(cycle)
        await miner.commit(cycle, trained(0.01 * cycle))
        await late.commit(cycle, trained(0.03 * cycle))
        await stage.to_submit(witness, cycle)
        await miner.upload(cycle, trained(0.01 * cycle), tmp_path / f"work-{cycle}")
        await miner.reveal(cycle, trained(0.01 * cycle))
        await witness.has("submit", cycle, "accepted", miner.key)
        rolled = [(late.key, 1)] if cycle == 2 else []
        assert sorted(await stage.settle(witness, cycle)) == sorted([(miner.key, cycle), *rolled])
        if cycle == 1:
            await late.upload(1, trained(0.03), tmp_path / "late")
            sequence = await late.reveal(1, trained(0.03))
            await witness.has("submit", 1, "refused", f"{late.key}-{sequence}")
        service.kill()
        (tmp_path / "a").mkdir(exist_ok=True)
        service = await start(f"again-{cycle}", **state).ready()
    assert list((tmp_path / "state").glob("log-committer-*.sqlite"))
