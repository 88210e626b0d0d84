"""A real trainer process against a real broker and store; the coordinator and the committer are played by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.loading import load_resident_local
from connito.bus import Bus
from connito.errors import Invalid, Retry
from connito.moe.footprint import Workload
from connito.moe.moments import Moments
from connito.moe.resident import read_targets, write_targets
from connito.protocol import commitment
from connito.protocol.submission import read_header, validate
from connito.service import rpc
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2, services_pb2, services_pb2_grpc
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.locked import unlocked
from connito.wire.subjects import FactKey

from services.trainer.adapters import RangeReader
from services.trainer.base import Base, Ranges
from services.trainer.training import OptimizerState
from tests.integration.tiny_run import Teller, TinyRun, prepare, telling, tiny_base

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


class Apis(services_pb2_grpc.RunServiceServicer, services_pb2_grpc.SubmissionServiceServicer):
    """Enrolment, upload slots and downloads, from the facts that the teller knows."""

    def __init__(self, teller: Teller, store: ArtifactStore) -> None:
        self.teller, self.store = teller, store
        self.uploads = 0
        self.downloads: list[str] = []

    async def EnrolMiner(self, request: services_pb2.EnrolMinerRequest, context: Any) -> Any:  # noqa: N802
        command, miner = rpc.open_request(request.envelope, "rpc.EnrolMiner", services_pb2.EnrolMinerCommand)
        enrolled = run_pb2.MinerEnrolled(run=command.run, miner=miner, label=command.label, order=request.envelope)
        await self.teller.say("run", 0, "miner", enrolled, miner)
        return services_pb2.EnrolMinerResponse()

    async def RequestUpload(self, request: services_pb2.RequestUploadRequest, context: Any) -> Any:  # noqa: N802
        command, miner = rpc.open_request(request.envelope, "rpc.RequestUpload", services_pb2.UploadCommand)
        accepted = self.teller.facts.commitment(command.cycle, miner)
        assert accepted is not None
        if not commitment.opens(
            accepted.digest,
            command.run,
            command.cycle,
            miner,
            command.base_state_digest,
            command.artifact.digest,
            command.salt,
        ):
            raise Invalid("this does not open it", reason=reasons_pb2.REASON_COMMITMENT_MISMATCH)
        self.uploads += 1
        url, headers = self.store.presign_put(command.artifact, 600)
        return services_pb2.RequestUploadResponse(url=url, headers=headers)

    async def RequestDownloads(self, request: services_pb2.RequestDownloadsRequest, context: Any) -> Any:  # noqa: N802
        command, _ = rpc.open_request(request.envelope, "rpc.RequestDownloads", services_pb2.DownloadsCommand)
        self.downloads += command.digests
        urls = {
            digest: self.store.presign_get(ArtifactRef(digest=digest, realm=REALM_PUBLIC), 600)
            for digest in command.digests
        }
        return services_pb2.RequestDownloadsResponse(urls=urls)


@asynccontextmanager
async def serving(apis: Apis, bus: Bus) -> AsyncIterator[None]:
    """Serve both APIs and register them as the coordinator's and the committer's."""
    servicers: list[tuple[Callable[[Any, Any], None], object, str]] = [
        (services_pb2_grpc.add_RunServiceServicer_to_server, apis, "connito.v1.RunService"),
        (services_pb2_grpc.add_SubmissionServiceServicer_to_server, apis, "connito.v1.SubmissionService"),
    ]
    async with rpc.serve(servicers, "127.0.0.1", 0) as port:
        for name in ("coordinator", "committer"):
            await bus.register_endpoint(name, f"127.0.0.1:{port}")
        yield


class Process:
    """A trainer process that can be killed and started again with the same folders."""

    def __init__(self, folder: Path, run: str, nats_url: str, miner: Identity, roster: Any, **settings: Any) -> None:
        miner.save(folder / "key")
        roster.save(folder / "roster.json")
        self.work_dir, self.log = folder / "work", folder / "trainer.log"
        self.env = {
            **os.environ,
            "CONNITO_NATS_URL": nats_url,
            "CONNITO_KEY_FILE": str(folder / "key"),
            "CONNITO_ROSTER": str(folder / "roster.json"),
            "CONNITO_WORK_DIR": str(self.work_dir),
            "CONNITO_CACHE_DIR": str(folder / "miner-cache"),
            "CONNITO_RUN": run,
            "CONNITO_TORCH_THREADS": "1",
            "CONNITO_LABEL": "tester",
            **settings,
        }
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.trainer", env=self.env, stderr=log, stdout=log
            )

    async def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()

    def text(self) -> str:
        return self.log.read_text()


@asynccontextmanager
async def trainer(*args: Any, **settings: Any) -> AsyncIterator[Process]:
    process = Process(*args, **settings)
    await process.start()
    try:
        yield process
    finally:
        await process.end(signal.SIGKILL)


async def tell_the_beginning(teller: Teller, tiny: TinyRun, miner: str) -> None:
    """Created, the miner enrols by itself, selected, train window opened."""
    await teller.say("run", 0, "created", run_pb2.RunCreated(spec=tiny.spec))
    await teller.until(lambda facts: miner in facts.miners, "the enrolment")
    await teller.say("run", 0, "selected", tiny.selection, role="selector")
    await teller.open("train", 1, [miner], tiny.state)


async def accept_commitment(teller: Teller, miner: str, cycle: int = 1) -> bytes:
    """Wait for a commitment, accept it, close and settle the window. Returns the commitment."""
    await teller.until(lambda facts: facts.has("ingress", cycle, "commitment", miner), "the commitment")
    fact = teller.facts.fact("ingress", cycle, "commitment", miner)
    assert fact is not None
    assert isinstance(fact.message, cycle_pb2.Commitment)
    digest = fact.message.digest
    accepted = cycle_pb2.CommitmentAccepted(
        run=teller.run, cycle=cycle, miner=miner, digest=digest, ingress_sequence=fact.sequence
    )
    await teller.say("commit", cycle, "accepted", accepted, miner, role="committer")
    await teller.close("commit", cycle)
    settled = cycle_pb2.WindowSettled(run=teller.run, cycle=cycle, window=cycle_pb2.WINDOW_COMMIT, committed=[miner])
    await teller.say("commit", cycle, "settled", settled, role="committer")
    return digest


def reveal_of(facts: RunFacts, miner: str, cycle: int = 1) -> cycle_pb2.Reveal:
    return facts.many(cycle_pb2.Reveal, "ingress", cycle, "reveal")[miner].message


async def check_submission(store: ArtifactStore, tiny: TinyRun, reveal: cycle_pb2.Reveal, folder: Path) -> None:
    """What was uploaded is, unlocked, a well-formed submission that differs from θ_0."""
    path = unlocked(await store.fetch(reveal.artifact), reveal.artifact, folder)
    validate(path, read_header(tiny.theta), tiny.theta, 0.5)
    assert reveal.artifact.content != tiny.state.digest


@pytest.fixture
async def buses(bus_factory: Any, identities: dict[str, Identity]) -> dict[str, Bus]:
    return {
        role: await bus_factory(identities[role]) for role in ("coordinator", "selector", "committer", "aggregator")
    }


async def test_a_cycle_with_kill_9_after_every_promise(
    nats_server: Any, store: ArtifactStore, buses: Any, roster: Any, run_id: str, tmp_path: Path
) -> None:
    miner = Identity.generate()
    me, tiny = miner.public, await prepare(store, run_id, tmp_path)
    async with telling(run_id, buses, roster) as teller:
        apis = Apis(teller, store)  # type: ignore[abstract] # what it leaves out is answered by gRPC
        async with (
            serving(apis, buses["coordinator"]),
            trainer(tmp_path, run_id, nats_server.url, miner, roster) as process,
        ):
            await tell_the_beginning(teller, tiny, me)
            await teller.until(lambda facts: me in facts.trained(1), "trained")
            said = teller.facts.trained(1)[me].message
            assert (said.steps, said.tokens) == (6, 6 * 4 * 64)
            # The base came as byte ranges: no whole file of weights was downloaded.
            assert not list(
                (tmp_path / "miner-cache" / "sha256").rglob(tiny.manifest.files["model.safetensors"].digest)
            )
            assert list((tmp_path / "miner-cache" / "ranges").iterdir())

            await process.end(signal.SIGKILL)
            await teller.close("train", 1)
            await teller.open("commit", 1, [me], tiny.state)
            await process.start()
            digest = await accept_commitment(teller, me)

            await process.end(signal.SIGKILL)
            await teller.open("submit", 1, [me], tiny.state)
            await process.start()
            await teller.until(lambda facts: me in facts.many(cycle_pb2.Reveal, "ingress", 1, "reveal"), "the reveal")
            reveal = reveal_of(teller.facts, me)
            assert commitment.opens(
                digest, run_id, 1, me, reveal.base_state_digest, reveal.artifact.digest, reveal.salt
            )
            assert reveal.base_state_digest == tiny.state.digest
            await check_submission(store, tiny, reveal, tmp_path)

            verdict = cycle_pb2.Verdict(
                miner=me, status=cycle_pb2.VERDICT_STATUS_MERGED, rank=1, reward=700, utility=0.031
            )
            scored = cycle_pb2.CycleScored(run=run_id, cycle=1, verdicts=[verdict])
            await teller.say("merge", 1, "scored", scored, role="aggregator")
            # The next cycle: the trainer goes on from its new state.
            await teller.open("train", 2, [me], tiny.state)
            await teller.until(lambda facts: me in facts.trained(2), "trained in cycle 2")
            assert await process.end(signal.SIGTERM) == 0
            kept = {
                cycle: Moments.load(process.work_dir / run_id / cycle / OptimizerState.NAME).steps
                for cycle in ("1", "2")
            }
            assert kept == {"1": 6, "2": 12}, "the second cycle went on from the first one's moments"
            assert "merged: rank 1, reward 700, utility 0.0310" in process.text()
    # Nothing was said twice.
    subjects = [record.subject for record in await stored(buses["coordinator"], run_id)]
    assert sorted(subject.rsplit(".", 1)[1] for subject in subjects) == ["commitment", "reveal", "trained", "trained"]


async def stored(bus: Bus, run: str) -> list[Any]:
    """Everything that miners said in a run."""
    found = []
    async for item in bus.follow(["INGRESS"], run):
        if not hasattr(item, "subject"):
            break
        found.append(item)
    return found


async def test_a_refusal_is_shown_in_plain_words_and_a_free_rider_warns_about_itself(
    nats_server: Any, store: ArtifactStore, buses: Any, roster: Any, run_id: str, tmp_path: Path
) -> None:
    miner = Identity.generate()
    me, tiny = miner.public, await prepare(store, run_id, tmp_path)
    async with (
        telling(run_id, buses, roster) as teller,
        serving(Apis(teller, store), buses["coordinator"]),  # type: ignore[abstract]
        trainer(tmp_path, run_id, nats_server.url, miner, roster, CONNITO_TRAINER_ADVERSARY="freerider") as process,
    ):
        await tell_the_beginning(teller, tiny, me)
        await teller.until(lambda facts: me in facts.trained(1), "trained")
        await teller.close("train", 1)
        await teller.open("commit", 1, [me], tiny.state)
        await accept_commitment(teller, me)
        await teller.open("submit", 1, [me], tiny.state)
        await teller.until(lambda facts: me in facts.many(cycle_pb2.Reveal, "ingress", 1, "reveal"), "the reveal")
        assert reveal_of(teller.facts, me).artifact.content == tiny.state.digest
        fact = teller.facts.many(cycle_pb2.Reveal, "ingress", 1, "reveal").get(me)
        assert fact is not None
        refused = cycle_pb2.Refused(
            run=run_id,
            cycle=1,
            window=cycle_pb2.WINDOW_SUBMIT,
            miner=me,
            reason=reasons_pb2.REASON_LATE_REVEAL,
            detail="the submit window is closed",
            ingress_sequence=fact.sequence,
        )
        await teller.say("submit", 1, "refused", refused, f"{me}-{fact.sequence}", role="committer")
        await teller.open("train", 2, [me], tiny.state)
        await teller.until(lambda facts: me in facts.trained(2), "cycle 2")
        assert await process.end(signal.SIGTERM) == 0
        assert "THIS MINER MISBEHAVES ON PURPOSE (freerider)" in process.text()
        assert "refused: late-reveal: the submit window is closed" in process.text()


def facts_of(tiny: TinyRun) -> RunFacts:
    facts = RunFacts(tiny.spec.run)
    for kind, message in (("created", run_pb2.RunCreated(spec=tiny.spec)), ("selected", tiny.selection)):
        facts.add(Fact(tiny.spec.run, FactKey("run", 0, kind), message, "", "RUNS", 1, 1))
    return facts


async def test_byte_ranges_give_the_same_model_and_heal_when_damaged(
    store: ArtifactStore, run_id: str, tmp_path: Path
) -> None:
    tiny, work = await prepare(store, run_id, tmp_path), Workload(1, 64)
    facts, targets, cpu = facts_of(tiny), tiny.targets, torch.device("cpu")
    urls = {name: store.presign_get(entry.ref, 600) for name, entry in tiny.manifest.files.items()}
    base = Base(tiny.manifest, None, Ranges(urls, tmp_path / "ranges"))
    start = {name: rows + 1 for name, rows in read_targets(load_resident_local(tiny_base(), targets)).items()}

    def states_of(model: Any) -> dict[str, Any]:
        write_targets(model, start)
        return dict(model.state_dict()) | read_targets(model)

    whole = Base(tiny.manifest, {name: tiny_base() / name for name in tiny.manifest.files}, None)
    expected = states_of(await asyncio.to_thread(whole.load, facts, cpu, work, start))
    fetched = states_of(await asyncio.to_thread(base.load, facts, cpu, work, start))
    assert fetched.keys() == expected.keys()
    assert all(fetched[name].equal(expected[name]) for name in expected)
    # Per adapted layer, one helper of eight experts was read, and of the two targets nothing.
    read = list((tmp_path / "ranges").rglob("*-*"))
    unread = sum(7 * tiny.manifest.expert_bytes()[layer] for layer in targets)
    assert sum(path.stat().st_size for path in read) <= tiny.manifest.size + (1 << 16) - unread

    largest = max(read, key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    with pytest.raises(Retry, match="damaged"):
        await asyncio.to_thread(base.load, facts, cpu, work, start)
    healed = states_of(await asyncio.to_thread(base.load, facts, cpu, work, start))
    assert all(healed[name].equal(expected[name]) for name in expected)


async def test_a_store_that_is_gone_is_tried_again(tmp_path: Path) -> None:
    reader = RangeReader("http://127.0.0.1:9/bucket/key?signature=x")
    with pytest.raises(Retry, match="broke off"):
        await asyncio.to_thread(reader.read, 0, 10)
