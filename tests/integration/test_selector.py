"""The selector as a process: a run is created, and its targets are fixed or it is told why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from connito.bus import Bus
from connito.data.safetensors_header import SAFETENSORS
from connito.moe.rows import base_digests
from connito.moe.state import load_state
from connito.platform.servers import NatsServer, ObjectStore
from connito.store import ArtifactStore
from connito.v1 import reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire import subjects
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.integration.conftest import BusFactory
from tests.integration.tiny_run import TARGET, TinyRun, corpus, prepare
from tests.integration.witness import ServiceProcess, Witness

pytestmark = pytest.mark.integration


def store_env(server: ObjectStore, store: ArtifactStore) -> dict[str, str]:
    return {
        "CONNITO_S3_ENDPOINT": server.url,
        "CONNITO_S3_ACCESS_KEY": server.access_key,
        "CONNITO_S3_SECRET_KEY": server.secret_key,
        "CONNITO_S3_BUCKET": store.bucket,
    }


@pytest.fixture
def process(
    own_nats: NatsServer,
    object_store: ObjectStore,
    store: ArtifactStore,
    tmp_path: Path,
    identities: dict[str, Identity],
    roster: Roster,
) -> Iterator[ServiceProcess]:
    env = {"CONNITO_NATS_URL": own_nats.url, "CONNITO_TORCH_THREADS": "1", **store_env(object_store, store)}
    service = ServiceProcess("selector", tmp_path / "selector", identities["selector"], roster, env).start()
    yield service
    service.kill()


@pytest.fixture
async def bus(own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]) -> Bus:
    return await bus_factory(identities["coordinator"], own_nats.url)


@pytest.fixture
async def tiny(store: ArtifactStore, run_id: str, tmp_path: Path) -> TinyRun:
    tiny = await prepare(store, run_id, tmp_path)
    probe = await store.put_bytes(corpus(TARGET, 15, 30).to_bytes(), SAFETENSORS, REALM_PUBLIC)
    tiny.spec.probe.CopyFrom(run_pb2.CorpusRef(domain=TARGET, artifact=probe))
    tiny.spec.selection.CopyFrom(
        run_pb2.SelectionPolicy(method="esft-token", threshold=0.5, max_experts=6, helpers_per_layer=2)
    )
    return tiny


async def create(bus: Bus, spec: run_pb2.RunSpec) -> None:
    assert await bus.publish_fact(spec.run, "run", 0, "created", run_pb2.RunCreated(spec=spec))


async def test_the_targets_of_a_run_are_selected(
    bus: Bus, process: ServiceProcess, store: ArtifactStore, roster: Roster, tiny: TinyRun
) -> None:
    async with Witness.reading(bus, roster, tiny.spec.run) as witness:
        await create(bus, tiny.spec)
        selection = (await witness.has("run", 0, "selected", timeout=90)).selection

    assert selection is not None
    report = json.loads(await store.get_bytes(selection.report))
    layers = {str(layer.layer): list(layer.experts) for layer in selection.layers}
    assert report["layers"] == layers
    assert selection.selected_experts == sum(map(len, layers.values())) <= 6
    assert all(len(layer.helpers) == 2 for layer in selection.layers)
    theta = load_state(await store.fetch(selection.initial_state))
    assert selection.target_parameters == sum(tensor.numel() for tensor in theta.values())
    assert {name.split(".")[1] for name in theta} == set(layers)
    await check_base(tiny, store, selection, report)


async def check_base(
    tiny: TinyRun, store: ArtifactStore, selection: run_pb2.SelectionMade, report: dict[str, Any]
) -> None:
    """The report identifies the base as anyone else who loads it sees it."""
    from connito.base.loading import load_full

    files = {
        name: await store.fetch(ArtifactRef(digest=file.digest, size=file.size, realm=REALM_PUBLIC))
        for name, file in tiny.manifest.files.items()
    }
    digests = base_digests(load_full(files), {layer.layer: layer.experts for layer in selection.layers})
    assert report["base"] == {"rest": digests.rest, "rows": digests.rows}


async def test_a_kill_in_the_middle_loses_nothing_and_changes_nothing(
    bus: Bus, process: ServiceProcess, roster: Roster, tiny: TinyRun, own_nats: NatsServer
) -> None:
    """Two runs of one spec, one of them through a SIGKILL right after the message was taken: the same selection."""
    async with Witness.reading(bus, roster, tiny.spec.run) as first:
        await create(bus, tiny.spec)
        expected = (await first.has("run", 0, "selected", timeout=90)).selection
    again = run_pb2.RunSpec()
    again.CopyFrom(tiny.spec)
    again.run = f"{tiny.spec.run}-again"
    async with Witness.reading(bus, roster, again.run) as second:
        await create(bus, again)
        process.kill()
        process.start()
        selection = (await second.has("run", 0, "selected", timeout=90)).selection

    assert expected is not None
    assert selection is not None
    assert selection.report == expected.report
    assert selection.initial_state == expected.initial_state


def broken(spec: run_pb2.RunSpec, number: int, **changes: object) -> run_pb2.RunSpec:
    """A spec of a run of its own, with one thing wrong."""
    out = run_pb2.RunSpec()
    out.CopyFrom(spec)
    out.run = f"{spec.run}-{number}"
    for path, value in changes.items():
        *parents, name = path.split("__")
        owner: object = out
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return out


async def test_jobs_that_cannot_be_end_with_a_reason(
    bus: Bus, process: ServiceProcess, roster: Roster, tiny: TinyRun
) -> None:
    wrong: list[tuple[dict[str, Any], reasons_pb2.Reason.ValueType, str]] = [
        ({"selection__threshold": 7.0}, reasons_pb2.REASON_SELECTION_FAILED, "threshold"),
        ({"selection__method": "guess"}, reasons_pb2.REASON_SELECTION_FAILED, "guess"),
        ({"training__sequence_length": 100_000}, reasons_pb2.REASON_BAD_SPEC, "tokens"),
        ({"merging__report_target_sequences": 100_000}, reasons_pb2.REASON_BAD_SPEC, "hold-out"),
        ({"probe__artifact__digest": "0" * 64}, reasons_pb2.REASON_ARTIFACT_MISSING, "store"),
        ({"base__manifest__digest": "nonsense"}, reasons_pb2.REASON_SELECTION_FAILED, "SHA-256"),
    ]
    for number, (changes, reason, text) in enumerate(wrong):
        spec = broken(tiny.spec, number, **changes)
        async with Witness.reading(bus, roster, spec.run) as witness:
            await create(bus, spec)
            facts = await witness.has("run", 0, "selection_failed", timeout=90)
        failed = facts.selection_failed
        assert failed is not None
        assert failed.reason == reason, failed.detail
        assert text in failed.detail
        assert facts.selection is None


async def test_a_run_that_is_over_is_not_selected_for(
    bus: Bus, process: ServiceProcess, roster: Roster, tiny: TinyRun, run_id: str
) -> None:
    ended = run_pb2.RunEnded(run=run_id, outcome=run_pb2.RUN_OUTCOME_CANCELLED)
    await bus.publish_fact(run_id, "run", 0, "ended", ended)
    follower = run_pb2.RunSpec()
    follower.CopyFrom(tiny.spec)
    follower.run = f"{run_id}-b"
    async with Witness.reading(bus, roster, follower.run) as witness:
        await create(bus, tiny.spec)
        await create(bus, follower)
        await witness.has("run", 0, "selected", timeout=90)

    assert await bus.last_record(subjects.fact(run_id, "run", 0, "selected")) is None
