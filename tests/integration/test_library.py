"""The library as a process: a run ends, its expert is deposited, found over the API, and loaded into the base."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import connito
import grpc
import psutil
import pytest
from connito import library
from connito.base.checks import check_base
from connito.base.description import build_manifest
from connito.base.loading import load_full
from connito.bus import Bus
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import Invalid, NotFound
from connito.experts.assemble import Mixture, compose_experts
from connito.experts.compose import Recipe
from connito.library.attestation import check_attestation
from connito.library.membership import claimed
from connito.library.record import encode
from connito.library.schema import ExpertRecord, read_record
from connito.moe.rows import base_digests, fingerprint, read_rows
from connito.moe.state import load_state, save_state
from connito.platform.servers import NatsServer, ObjectStore
from connito.service import rpc
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.v1.envelope_pb2 import Envelope
from connito.v1.services_pb2_grpc import LibraryServiceStub
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from google.protobuf.message import Message
from transformers import AutoModelForCausalLM

from tests.integration.conftest import BusFactory
from tests.integration.test_selector import store_env
from tests.integration.tiny_run import TARGET, TinyRun, prepare, tiny_base
from tests.integration.witness import ServiceProcess, Witness
from tests.support.waiting import PATIENCE, declared

pytestmark = pytest.mark.integration

START_SECONDS = 2.0
MEMORY_BYTES = 120 << 20


@pytest.fixture
def process(
    own_nats: NatsServer,
    object_store: ObjectStore,
    store: ArtifactStore,
    tmp_path: Path,
    identities: dict[str, Identity],
    roster: Roster,
) -> Iterator[ServiceProcess]:
    env = {"CONNITO_NATS_URL": own_nats.url, **store_env(object_store, store)}
    service = ServiceProcess("library", tmp_path / "library", identities["library"], roster, env)
    yield service
    service.kill()


@pytest.fixture
async def buses(own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]) -> dict[str, Bus]:
    roles = ("coordinator", "selector", "aggregator")
    return {role: await bus_factory(identities[role], own_nats.url) for role in roles}


async def finish(
    buses: dict[str, Bus],
    store: ArtifactStore,
    run: str,
    tmp_path: Path,
    gate: cycle_pb2.GateDecision.ValueType,
    owner: Identity | None = None,
    organisation: str = "",
) -> TinyRun:
    """Tell a run of one cycle from its creation to its end. The merged state is the base's rows, moved a little; with an
    `owner`, the expert is private to them, or to their `organisation`."""
    tiny = await prepare(store, run, tmp_path)
    if owner is not None:
        tiny.spec.customer, tiny.spec.organisation = owner.public, organisation
        tiny.spec.visibility = "organisation" if organisation else "private"
    model = load_full(tiny_base())
    base = base_digests(model, tiny.targets)
    report = json.dumps({"base": {"rest": base.rest, "rows": base.rows}}).encode()
    tiny.selection.report.CopyFrom(await store.put_bytes(report, "application/json", REALM_PUBLIC))
    state = tmp_path / "final.safetensors"
    save_state({name: rows * 1.01 for name, rows in read_rows(model, tiny.targets).items()}, state, {"version": "1"})
    version = cycle_pb2.VersionPublished(
        run=run,
        cycle=1,
        version=1,
        state=await store.put_file(state, SAFETENSORS, REALM_PUBLIC),
        gate=gate,
        losses=[cycle_pb2.DomainLoss(domain=TARGET, before=2.0, after=1.5, tokens=640)],
        merged=["UA"],
        weights=[1.0],
    )
    verdict = cycle_pb2.Verdict(miner="UA", status=cycle_pb2.VERDICT_STATUS_MERGED, reward=100, rank=1)
    opened = cycle_pb2.WindowOpened(run=run, cycle=1, state=tiny.state)
    ended = run_pb2.RunEnded(run=run, outcome=run_pb2.RUN_OUTCOME_COMPLETED, final_version=1)
    story: list[tuple[str, str, int, str, Message]] = [
        ("coordinator", "run", 0, "created", run_pb2.RunCreated(spec=tiny.spec)),
        ("selector", "run", 0, "selected", tiny.selection),
        ("coordinator", "train", 1, "opened", opened),
        ("aggregator", "merge", 1, "scored", cycle_pb2.CycleScored(run=run, cycle=1, verdicts=[verdict])),
        ("aggregator", "merge", 1, "version", version),
        ("coordinator", "run", 0, "ended", ended),
    ]
    for role, section, cycle, kind, message in story:
        assert await buses[role].publish_fact(run, section, cycle, kind, message)
    return tiny


async def ask(bus: Bus, process: ServiceProcess) -> LibraryServiceStub:
    """Ask the process that runs now: it listens a moment before its address replaces that of one before."""
    async with asyncio.timeout(PATIENCE):
        while not (address := await bus.find_endpoint("library")).endswith(f":{process.ports.get('grpc')}"):  # noqa: ASYNC110 - the log's progress
            await asyncio.sleep(0.02)
    return LibraryServiceStub(rpc.channel(address))


async def deposited(bus: Bus, roster: Roster, run: str) -> run_pb2.ExpertDeposited:
    async with Witness.reading(bus, roster, run) as witness:
        facts = await witness.until(lambda facts: facts.deposits)
    (fact,) = facts.deposits.values()
    assert isinstance(fact.message, run_pb2.ExpertDeposited)
    return fact.message


async def test_a_finished_runs_expert_is_deposited_found_and_loaded(
    buses: dict[str, Bus], process: ServiceProcess, store: ArtifactStore, roster: Roster, run_id: str, tmp_path: Path
) -> None:
    bus = buses["coordinator"]
    await process.start().ready()
    tiny = await finish(buses, store, run_id, tmp_path, cycle_pb2.GATE_DECISION_ACCEPTED)
    fact = await deposited(bus, roster, run_id)

    stub = await ask(bus, process)
    found = await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id=fact.expert_id))
    listed = await rpc.call(stub.ListExperts, services_pb2.ListExpertsRequest())
    record = json.loads(found.record_json)
    assert [expert.expert_id for expert in listed.experts] == [fact.expert_id]
    assert fact.expert_id == f"{TARGET}-{fact.expert.digest[:12]}"
    assert record["losses"] == [{"domain": TARGET, "before": 2.0, "after": 1.5, "tokens": 640}]
    assert record["contributors"][0]["share"] == 1.0
    card = await store.get_bytes(
        ArtifactRef(digest=record["card"]["digest"], size=record["card"]["bytes"], realm=REALM_PUBLIC)
    )
    assert card.decode().startswith("---\nlibrary_name: connito\n")
    assert f"\n---\n\n# {fact.expert_id}\n" in card.decode()
    await load_it(tiny, store, fact, found.record_json, tmp_path)
    with pytest.raises(NotFound, match="connito library list"):
        await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id="nobody"))
    with pytest.raises(Invalid, match="page token"):
        await rpc.call(stub.ListExperts, services_pb2.ListExpertsRequest(page_token="x"))


async def test_it_is_searched_marked_metered_and_private_things_stay_so(
    buses: dict[str, Bus],
    process: ServiceProcess,
    store: ArtifactStore,
    roster: Roster,
    identities: dict[str, Identity],
    run_id: str,
    tmp_path: Path,
) -> None:
    """Statements and uses are facts, so they show again after the index is gone and the process was killed."""
    bus, customer = buses["coordinator"], identities["customer"]
    await process.start().ready()
    await finish(buses, store, run_id, tmp_path, cycle_pb2.GATE_DECISION_ACCEPTED, customer)
    fact = await deposited(bus, roster, run_id)
    stub, name = await ask(bus, process), fact.expert_id
    public = await rpc.call(stub.SearchExperts, services_pb2.SearchExpertsRequest(text=TARGET))
    assert not public.hits
    with pytest.raises(NotFound):
        await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id=name))

    def viewer() -> Envelope:
        return seal(customer, "rpc.ReadLibrary", services_pb2.ReadLibraryCommand())

    async def own() -> services_pb2.ExpertHit:
        request = services_pb2.SearchExpertsRequest(text=TARGET, everything=True, viewer=viewer())
        (hit,) = (await rpc.call(stub.SearchExperts, request)).hits
        found: services_pb2.ExpertHit = hit
        return found

    assert (await own()).saving == pytest.approx(0.5)
    found = await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id=name, viewer=viewer()))
    check_it(await store.fetch(fact.expert), found, roster, tmp_path / "home")
    stale = seal(customer, "rpc.ReadLibrary", services_pb2.ReadLibraryCommand(), now_ms=1)
    with pytest.raises(Invalid, match=r"5 are let through: .* the signer's or the broker's"):
        await rpc.call(stub.ListExperts, services_pb2.ListExpertsRequest(viewer=stale))
    command = services_pb2.MarkExpertCommand(subject=name, kind=run_pb2.NOTICE_KIND_YANKED, reason="leak")
    stranger = seal(Identity.generate(), "rpc.MarkExpert", command)
    with pytest.raises(Invalid, match="not yours"):
        await rpc.call(stub.MarkExpert, services_pb2.MarkExpertRequest(envelope=stranger))
    await rpc.call(stub.MarkExpert, services_pb2.MarkExpertRequest(envelope=seal(customer, "rpc.MarkExpert", command)))
    use = seal(customer, "rpc.MeterUse", services_pb2.MeterUseCommand(expert_id=name, verb="export", units=2))
    for _ in range(2):  # sent again, it is the same use
        await rpc.call(stub.MeterUse, services_pb2.MeterUseRequest(envelope=use))

    for _ in range(2):
        ledger = services_pb2.GetLedgerRequest(expert_id=name, viewer=viewer())
        async with asyncio.timeout(PATIENCE):
            while not (await rpc.call(stub.GetLedger, ledger)).uses:  # noqa: ASYNC110 - the log's progress
                await asyncio.sleep(0.05)
        hit, answer = await own(), await rpc.call(stub.GetLedger, ledger)
        assert (hit.status, hit.reason) == ("yanked", "leak")
        assert (dict(answer.uses), dict(answer.credited)) == ({"export": 2}, {"UA": 2})
        process.kill()
        await process.start().ready()
        stub = await ask(bus, process)
    assert await bus.last_sequence("LIBRARY") == 3


def check_it(file: Path, found: services_pb2.GetExpertResponse, roster: Roster, folder: Path) -> None:
    """What the API gives out verifies offline, against the operator's roster."""
    folder.mkdir()
    shutil.copy(file, folder / "expert.safetensors")
    (folder / "record.json").write_text(found.record_json)
    (folder / "attestation.json").write_text(found.attestation_json)
    assert len(check_attestation(folder, roster)) == 2


async def load_it(
    tiny: TinyRun, store: ArtifactStore, fact: run_pb2.ExpertDeposited, record: str, tmp_path: Path
) -> None:
    """What the library gives out goes into the base as a stranger loads it, and out again."""
    folder = tmp_path / "export"
    folder.mkdir()
    shutil.copy(await store.fetch(fact.expert), folder / "expert.safetensors")
    (folder / "record.json").write_text(record)
    model = AutoModelForCausalLM.from_pretrained(tiny_base())
    before = fingerprint(model)

    loaded = connito.load_expert(model, folder)

    state, rows = load_state(tmp_path / "final.safetensors"), read_rows(model, tiny.targets)
    assert all(rows[name].equal(state[name]) for name in state)
    assert loaded.changed
    loaded.remove()
    assert fingerprint(model) == before


async def test_the_library_is_rebuilt_from_the_log_and_deposits_once(
    buses: dict[str, Bus], process: ServiceProcess, store: ArtifactStore, roster: Roster, run_id: str, tmp_path: Path
) -> None:
    """Killed, and the queue made to deliver the run's end once more: the same bytes, one deposit."""
    bus = buses["coordinator"]
    await process.start().ready()
    await finish(buses, store, run_id, tmp_path, cycle_pb2.GATE_DECISION_TOP_1)
    fact = await deposited(bus, roster, run_id)
    process.kill()
    await bus.js.delete_consumer("RUNS", "library")
    await declared(bus.js)
    await process.start().ready()
    async with asyncio.timeout(PATIENCE):
        while await bus.ack_floor("library") < await bus.last_sequence("RUNS"):  # noqa: ASYNC110 - the broker's state
            await asyncio.sleep(0.05)

    # The killed one's address stands in the broker until the new one has written its own there.
    stub = LibraryServiceStub(rpc.channel(f"127.0.0.1:{process.ports['grpc']}"))
    found = await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id=fact.expert_id))

    assert found.expert.expert == fact.expert
    assert await bus.last_sequence("LIBRARY") == 1


async def test_a_run_that_merged_nothing_deposits_nothing(
    buses: dict[str, Bus], process: ServiceProcess, store: ArtifactStore, roster: Roster, run_id: str, tmp_path: Path
) -> None:
    bus = buses["coordinator"]
    await process.start().ready()
    await finish(buses, store, run_id, tmp_path, cycle_pb2.GATE_DECISION_KEPT_INCUMBENT)
    await finish(buses, store, f"{run_id}-b", tmp_path, cycle_pb2.GATE_DECISION_ACCEPTED)
    await deposited(bus, roster, f"{run_id}-b")

    assert "no submission was merged" in process.log.read_text()
    assert await bus.last_sequence("LIBRARY") == 1


async def test_it_starts_fast_and_small(process: ServiceProcess, buses: dict[str, Bus]) -> None:
    """User and system time of the process until its API listens, so that other work on the machine does not count."""
    await process.start().ready()

    assert process.process is not None
    running = psutil.Process(process.process.pid)
    cpu, memory = running.cpu_times(), running.memory_info().rss
    print(f"library: {cpu.user + cpu.system:.2f} s of CPU until ready, {memory / (1 << 20):.0f} MiB resident")
    assert cpu.user + cpu.system < START_SECONDS
    assert memory < MEMORY_BYTES
    assert process.drain() == 0


async def test_health_is_there(process: ServiceProcess, buses: dict[str, Bus]) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    await process.start().ready()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{process.ports['grpc']}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="connito.v1.LibraryService")
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def shown(
    bus: Bus, process: ServiceProcess, roster: Roster, run: str
) -> tuple[run_pb2.ExpertDeposited, LibraryServiceStub, services_pb2.GetExpertResponse]:
    """The deposit of a run that has ended, the library's stub, and what it shows of the expert."""
    fact, stub = await deposited(bus, roster, run), await ask(bus, process)
    return fact, stub, await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id=fact.expert_id))


async def test_what_a_customer_derives_joins_with_lineage_and_signature(
    buses: dict[str, Bus],
    process: ServiceProcess,
    store: ArtifactStore,
    roster: Roster,
    identities: dict[str, Identity],
    run_id: str,
    tmp_path: Path,
) -> None:
    bus, customer = buses["coordinator"], identities["customer"]
    await process.start().ready()
    await finish(buses, store, run_id, tmp_path, cycle_pb2.GATE_DECISION_ACCEPTED)
    fact, stub, answer = await shown(bus, process, roster, run_id)
    parent = tmp_path / "parent"
    parent.mkdir()
    shutil.copy(await store.fetch(fact.expert), parent / "expert.safetensors")
    found = (parent, read_record(answer.record_json, parent))
    made = compose_experts(
        load_full(tiny_base()), [found], tmp_path / "made", Mixture(Recipe("sum"), {fact.expert_id: 0.5}),
        license=found[1]["license"], created="2031-01-01T00:00:00.000+00:00",
    )  # fmt: skip

    async def put(signer: Identity, record: ExpertRecord) -> services_pb2.DepositExpertResponse:
        return await give(stub, store, signer, tmp_path / "made", record)

    owned = claimed(made, customer.public)
    with pytest.raises(Invalid, match="no customer"):
        await put(Identity.generate(), made)
    with pytest.raises(Invalid, match="owner"):
        await put(customer, made)
    with pytest.raises(Invalid, match="licence"):
        await put(customer, {**owned, "license": "CC0-1.0"})
    with pytest.raises(Invalid, match="file that you deposit"):
        await put(customer, {**owned, "expert": {**owned["expert"], "bytes": 7}})
    for _ in range(2):
        assert (await put(customer, owned)).expert.expert_id == made["expert_id"]

    said = await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id=made["expert_id"]))
    check_it(tmp_path / "made" / "expert.safetensors", said, roster, tmp_path / "home")
    assert json.loads(said.record_json)["derived"]["parents"][0]["expert_id"] == fact.expert_id
    hits = (await rpc.call(stub.SearchExperts, services_pb2.SearchExpertsRequest(text=TARGET))).hits
    assert {hit.expert.expert_id for hit in hits} == {fact.expert_id, made["expert_id"]}
    assert await bus.last_sequence("LIBRARY") == 2


async def give(
    stub: LibraryServiceStub, store: ArtifactStore, signer: Identity, folder: Path, record: ExpertRecord
) -> services_pb2.DepositExpertResponse:
    names = list(record.get("files", {})) or ["expert.safetensors"]
    refs = {name: await store.put_file(folder / name, SAFETENSORS, REALM_PUBLIC) for name in names}
    weights = next(ref for ref in refs.values() if ref.digest == record["expert"]["digest"])
    command = services_pb2.DepositExpertCommand(
        expert=weights,
        record=await store.put_bytes(encode(record), "application/json", REALM_PUBLIC),
        files=refs.values() if "files" in record else (),
    )
    request = services_pb2.DepositExpertRequest(envelope=seal(signer, "rpc.DepositExpert", command))
    done: services_pb2.DepositExpertResponse = await rpc.call(stub.DepositExpert, request)
    return done


async def test_models_made_of_an_expert_join_from_a_folder_of_any_name(
    buses: dict[str, Bus],
    process: ServiceProcess,
    store: ArtifactStore,
    roster: Roster,
    identities: dict[str, Identity],
    run_id: str,
    tmp_path: Path,
) -> None:
    """Pruned with the expert in it, and grown beside it: their lineage and what they measured are in the library."""
    bus, customer = buses["coordinator"], identities["customer"]
    await process.start().ready()
    await finish(buses, store, run_id, tmp_path, cycle_pb2.GATE_DECISION_ACCEPTED)
    fact, stub, answer = await shown(bus, process, roster, run_id)
    expert, text, base = tmp_path / "expert", tmp_path / "notes.txt", tmp_path / "my own name for it"
    expert.mkdir()
    shutil.copy(await store.fetch(fact.expert), expert / "expert.safetensors")
    (expert / "record.json").write_text(answer.record_json)
    shutil.copytree(tiny_base(), base)
    text.write_text(" ".join(f"step {n}: stir the {n % 7} eggs slowly." for n in range(400)))
    (tmp_path / "shelf").mkdir()
    here, made = library.Holdings(shelf=tmp_path / "shelf"), dict[str, ExpertRecord]()
    agreed = library.Agreement(accepted=[json.loads(answer.record_json)["license"]])
    made["pruned"] = library.prune(
        library.ShrinkSource(base, [text], within=[expert], agreement=agreed),
        tmp_path / "pruned",
        library.PruneOptions(max_experts=9),
        here,
    )
    library.grow("own", base, tmp_path / "own.safetensors", library.GrowOptions([text], [text], steps=1))
    made["grown"] = library.join([tmp_path / "own.safetensors"], base, tmp_path / "grown", {"notes": text})

    for name, record in made.items():
        owned = claimed(record, customer.public)
        taken = (await give(stub, store, customer, tmp_path / name, owned)).expert
        said = await rpc.call(stub.GetExpert, services_pb2.GetExpertRequest(expert_id=taken.expert_id))
        kept = json.loads(said.record_json)
        assert len(taken.files) == len(record["files"])
        assert kept["losses"][0]["before"] > 0
        assert kept["base"]["manifest"] == fact.base_digest == build_manifest(base).digest
        check_base(tmp_path / name)  # A job can have it as its base.
    assert [len(experts) for experts in made["pruned"]["experts"].values()] == [4, 4]
    assert made["pruned"]["derived"]["parents"][0]["expert_id"] == fact.expert_id
    assert made["grown"]["settings"]["additions"][0]["name"] == "own"
