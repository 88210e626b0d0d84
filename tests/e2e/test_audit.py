"""What a finished run left, audited: the same; and after tampering with its log or its store, what was touched."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from connito.audit.artifacts import Named, gather
from connito.audit.evidence import read
from connito.bus import Bus, CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.platform.servers import NatsServer, ObjectStore
from connito.platform.session import BUCKET, REGION
from connito.protocol.scoring.proof_of_loss import score_submission
from connito.store import ArtifactStore, key_of
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.envelope_pb2 import Envelope
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.support.waiting import PATIENCE, declared

from .conftest import Finished, Up, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(up: Up) -> Finished:
    done = up("--cycles", "2", "--miners", "2", "--validators", "3", "--seed", "11", "--adversaries", "copier")
    assert done.code == 0, done.explain()
    return done


@pytest.fixture
def copy(run: Finished, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(run.data, folder)
    return folder


def connito(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "connito.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=200)


def audit(run: Finished, folder: Path, *options: str | Path) -> tuple[int, dict[str, Any], str]:
    done = connito("audit", run.report["run"], "--from", folder, "--json", *options)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def whole(run: Finished) -> dict[str, Any]:
    """The audit of the untouched run, with the model."""
    code, document, errors = audit(run, run.data, "--threads", "1")
    assert code == 0, errors
    return document


def test_a_run_is_recomputed_to_the_bit(run: Finished, whole: dict[str, Any]) -> None:
    assert (whole["result"], whole["differences"], whole["first"]) == ("same", [], None)
    checks = {(row["cycle"], row["check"]): row for row in whole["checks"]}
    for cycle in (1, 2):
        assert checks[cycle, "losses"]["note"].endswith("equal to the bit"), checks[cycle, "losses"]
        assert checks[cycle, "losses"]["compared"] > 100
        assert checks[cycle, "merge"]["note"].endswith("equal to the bit")
    assert checks[0, "selection"]["compared"] > 0
    assert checks[0, "expert"]["compared"] == 3
    # The folder is as it was, and nothing runs there.
    assert not (run.data / "platform.json").exists()


@pytest.mark.parametrize(("miner", "status", "reason"), [("miner-1", "merged", ""), ("copier-1", "rejected", "copy")])
def test_a_submission_is_explained(run: Finished, miner: str, status: str, reason: str) -> None:
    name = f"{run.report['run']}/2/{miner}"
    done = connito("explain", name, "--from", run.data, "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["result"] == "same"
    assert (document["verdict"]["status"], document["verdict"]["reason"]) == (status, reason)
    row = run.row(2, miner)
    assert (document["verdict"]["utility"], document["verdict"]["reward"]) == (row["utility"], row["reward"])
    # The run's default codec: ternary digits for every row.
    assert document["inputs"]["artifact"]["bytes"] * 24 < document["inputs"]["base_state"]["bytes"]
    assert len(document["reports"]) == 3
    assert all(report["losses"] for report in document["reports"])
    assert {row["check"] for row in document["checks"]} >= {"signatures", "artifacts", "losses", "merge", "verdicts"}


def test_what_is_not_there_is_told_apart_from_what_differs(run: Finished, tmp_path: Path) -> None:
    name = run.report["run"]
    for arguments, code, message in (
        (("audit", "no-such-run", "--from", run.data), 4, "no-such-run"),
        (("explain", f"{name}/1/nobody", "--from", run.data), 4, "miner-1"),
        (("explain", f"{name}/1", "--from", run.data), 3, "<run>/<cycle>/<miner>"),
        (("audit", name, "--from", tmp_path), 4, "is missing there"),
        (("audit", name, "--data-dir", tmp_path), 4, "connito up"),
    ):
        done = connito(*arguments)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr


async def test_a_flipped_byte_in_any_artifact_of_the_store_is_found(run: Finished, copy: Path) -> None:
    named = await flip_everything_stored(run, copy)
    kinds = {entry.what.split(" of ")[0].split("'s ")[0] for entry in named}
    assert kinds >= {
        "base manifest", "base model", "probe corpus", "training corpus", "hold-out corpus", "selection report",
        "routing statistics", "initial state θ_0", "submission", "state", "outer state", "coded step",
        "library expert", "record", "card",
    }  # fmt: skip
    # What an object names is only known from the object: those that name others are damaged in a second audit.
    code, document, errors = audit(run, copy, "--no-model")
    assert code == 6
    assert document["result"] == "differs"
    found = {d["where"] for d in document["differences"] if d["check"] == "artifacts"}
    pointers = ("base manifest", "selection report", "record of the library expert")
    behind = ("base model", "routing statistics", "card of")
    assert {str(entry) for entry in named if not entry.what.startswith(behind)} <= found
    assert document["first"]["where"].startswith("base manifest")
    assert document["first"]["where"] in errors
    await flip_everything_stored(run, copy, only=pointers)
    code, document, _ = audit(run, copy, "--no-model")
    found = {d["where"] for d in document["differences"] if d["check"] == "artifacts"}
    assert {str(entry) for entry in named if not entry.what.startswith(pointers)} <= found


async def test_a_flipped_byte_in_a_cached_copy_is_found(run: Finished, copy: Path) -> None:
    """With the time of its last change put back, as a disk's own error leaves it."""
    touched = set()
    for path in (copy / "cache" / "sha256").rglob("*"):
        if path.is_file() and len(path.name) == 64:
            before = path.stat()
            path.chmod(0o644)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            touched.add(path.name[:12])
    code, document, _ = audit(run, copy, "--no-model")
    assert (code, document["blame"]) == (0, ["nobody"]), "it is the auditor's own disk"
    found = {d["where"] for d in document["differences"]}
    assert all(where.endswith(", cached copy") for where in found)
    named = {where.rpartition("(")[2][:12] for where in found}
    assert named == touched


async def test_a_flipped_byte_in_any_kind_of_event_is_found(run: Finished, copy: Path) -> None:
    flipped: dict[str, Record] = {}

    def flip(record: Record) -> Record:
        kind = kind_of(record)
        if kind in flipped:
            return record
        data = bytearray(record.data)
        data[len(data) // 3] ^= 1
        flipped[kind] = record
        return replace(record, data=bytes(data))

    await rewrite(copy, flip)
    assert len(flipped) >= 27, sorted(flipped)
    code, document, _ = audit(run, copy, "--no-model")
    assert code == 6
    found = {d["where"] for d in document["differences"] if d["check"] == "signatures"}
    assert found == {
        f"{record.subject.split('.', 3)[-1]} ({record.stream} {record.sequence})" for record in flipped.values()
    }


async def test_a_reward_that_was_changed_and_signed_again_is_found(
    run: Finished, copy: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    aggregator = Identity.load(copy / "keys" / "aggregator.nk")

    def pay(record: Record) -> Record:
        if not record.subject.endswith("merge.1.scored"):
            return record
        envelope = Envelope.FromString(record.data)
        message = cycle_pb2.CycleScored.FromString(envelope.payload)
        message.verdicts[0].reward += 1
        sealed = seal(aggregator, record.subject, message, now_ms=record.time_unix_ms)
        return replace(record, data=sealed.SerializeToString())

    await rewrite(copy, pay, only="MERGE")
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(whole))
    code, document, errors = audit(run, copy, "--no-model", "--against", earlier)
    assert code == 6
    assert "signatures" not in {d["check"] for d in document["differences"]}
    verdicts = [d for d in document["differences"] if d["check"] == "verdicts"]
    assert verdicts[0]["where"] == "merge.1.scored"
    assert "reward" in verdicts[0]["what"]
    assert "differs, here:" in errors
    # The other auditor's chain agrees up to the window that was changed.
    assert [d["where"] for d in document["differences"] if d["check"] == "chain"] == ["merge.1"]
    miner = verdicts[0]["miner"]
    done = connito("explain", f"{run.report['run']}/1/{miner}", "--from", copy, "--no-model")
    assert done.returncode == 6
    assert "merge.1.scored: verdicts[0].reward" in done.stdout


async def test_what_only_the_model_can_tell_is_found_with_it(run: Finished, copy: Path) -> None:
    """A validator makes a submission look better, consistently, and the selector names other helpers; both sign."""
    touched: list[Record] = []
    async with broker(copy) as bus:
        spec = read(run.report["run"], await stored(bus), Roster.load(copy / "roster.json")).facts.spec

    def lie(record: Record) -> Record:
        envelope = Envelope.FromString(record.data)
        if record.subject.endswith("run.0.selected"):
            made = run_pb2.SelectionMade.FromString(envelope.payload)
            made.layers[0].helpers.pop()
            sealed = seal(Identity.load(copy / "keys" / "selector.nk"), record.subject, made)
            return replace(record, data=sealed.SerializeToString())
        if ".validate.1.report." not in record.subject or touched:
            return record
        touched.append(record)
        report = cycle_pb2.ScoreReport.FromString(envelope.payload)
        assert spec is not None
        for score in report.scores:
            for loss in score.losses:
                loss.after -= 0.01 * loss.tokens
            score.CopyFrom(
                score_submission(score.miner, score.artifact_digest, score.losses, spec.domain, spec.scoring)
            )
        keys = (Identity.load(path) for path in (copy / "keys").glob("validator-*.nk"))
        signer = next(identity for identity in keys if identity.public == report.validator)
        return replace(record, data=seal(signer, record.subject, report).SerializeToString())

    await rewrite(copy, lie)
    code, document, _ = audit(run, copy, "--threads", "1")
    assert code == 6
    found = {(d["check"], d["where"].split(" on ")[0]) for d in document["differences"]}
    assert ("selection", "run.0.selected") in found
    assert ("losses", touched[0].subject.split(".", 3)[-1]) in found
    others = {where for check, where in found if check == "losses"} - {touched[0].subject.split(".", 3)[-1]}
    assert others == set()
    assert {check for check, _ in found}.isdisjoint({"signatures", "artifacts", "reports", "beacon", "draws"})


def kind_of(record: Record) -> str:
    """`merge.scored`, `ingress.reveal`, …"""
    parts = record.subject.split(".")[3:]
    return f"ingress.{parts[2]}" if parts[0] == "ingress" else f"{parts[0]}.{parts[2]}"


@asynccontextmanager
async def broker(folder: Path) -> AsyncIterator[Bus]:
    server = NatsServer(folder / "nats", log_file=folder / "nats-test.log")
    await asyncio.to_thread(server.start)
    try:
        async with await Bus.connect(server.url, None, "tamper") as bus:
            yield bus
    finally:
        await asyncio.to_thread(server.stop)


async def stored(bus: Bus) -> list[Record]:
    records = []
    async with aclosing(bus.follow((*FACT_STREAMS, "INGRESS"))) as items:
        async for item in items:
            if isinstance(item, CaughtUp):
                break
            records.append(item)
    return sorted(records, key=lambda record: (record.time_unix_ms, record.stream, record.sequence))


async def rewrite(folder: Path, change: Callable[[Record], Record], only: str = "") -> None:
    """What an operator could do: throw streams away and write them again, message by message, with changes."""
    async with broker(folder) as bus:
        records = [record for record in await stored(bus) if only in ("", record.stream)]
        for stream in sorted({record.stream for record in records}):
            await bus.js.delete_stream(stream)
        await declared(bus.js)
        for record in records:
            acknowledged = await bus.js.publish(record.subject, change(record).data, timeout=PATIENCE)
            assert acknowledged.seq == record.sequence


async def flip_everything_stored(run: Finished, folder: Path, only: tuple[str, ...] = ()) -> list[Named]:
    """One byte of every object that the log names; done twice, it is undone. Returns what was named in the untouched run."""
    async with broker(folder) as bus:
        evidence = read(run.report["run"], await stored(bus), Roster.load(folder / "roster.json"))
    secret = (folder / "keys" / "store.secret").read_text().strip()
    server = ObjectStore(folder / "objects", secret_key=secret, log_file=folder / "weed-test.log")
    await asyncio.to_thread(server.start)
    try:
        store = ArtifactStore(server.url, server.access_key, secret, BUCKET, REGION, folder / "cache-test")
        found = await gather(evidence, _Sized(store))
        for ref in {e.ref.digest: e.ref for e in found.named if not only or e.what.startswith(only)}.values():
            await asyncio.to_thread(_flip, store, ref)
        return found.named
    finally:
        await asyncio.to_thread(server.stop)


class _Sized:
    """Some references carry no size; the store knows it."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def fetch(self, ref: ArtifactRef) -> Path:
        size = await self._store.stat(ref)
        return await self._store.fetch(ArtifactRef(digest=ref.digest, size=size or 0, realm=ref.realm))


def _flip(store: ArtifactStore, ref: ArtifactRef) -> None:
    client, key = store._client, key_of(ref)
    response = client.get_object(BUCKET, key)
    data = bytearray(response.read())
    response.close()
    response.release_conn()
    data[len(data) // 2] ^= 1
    client.put_object(BUCKET, key, io.BytesIO(bytes(data)), len(data))
