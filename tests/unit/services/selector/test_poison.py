"""A customer's base or corpora make the selector fail: his run ends with the reason, and the next customer's is selected."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from connito.data.corpus import Corpus
from connito.errors import Retry
from connito.protocol.findings import PROTOCOL_VERSION
from connito.protocol.policy.law import DEFAULTS
from connito.runtime.waiting import here_and_now
from connito.v1 import reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.subjects import fact
from connito.workloads import selecting

from services.selector.actions import Selector

COORDINATOR = Identity.generate()
ROSTER = Roster({"coordinator": frozenset({COORDINATOR.public})})
VOCABULARY = 260


@dataclass
class World:
    """What the selector reads and writes."""

    folder: Path
    written: list[tuple[str, Any]] = field(default_factory=list)
    identity: Identity = field(default_factory=Identity.generate)

    async def last_record(self, subject: str) -> None:
        return None

    async def publish_fact(self, run: str, section: str, cycle: int, kind: str, message: Any) -> bool:
        self.written.append((kind, message))
        return True

    async def fetch(self, ref: ArtifactRef) -> Path:
        return self.folder / ref.digest

    def put(self, data: bytes) -> ArtifactRef:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / digest).write_bytes(data)
        return ArtifactRef(digest=digest, size=len(data), realm=REALM_PUBLIC)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    class Described:
        vocabulary = VOCABULARY

    monkeypatch.setattr("connito.base.description.describe_files", lambda files: Described())
    monkeypatch.setattr("connito.data.checkpoint_files.find_checkpoint", lambda files: files)
    return World(tmp_path)


def text(separator: str = "256", token: int = 7, documents: int = 400) -> bytes:
    made = [[(token + i * j) % 250 if j else token for j in range(99)] for i in range(documents)]
    return Corpus.from_documents(made, {"domain": "d", "split": "train", "separator": separator}).to_bytes()


def spec_of(world: World, manifest: bytes | None = None, **corpora: bytes) -> run_pb2.RunSpec:
    spec = run_pb2.RunSpec()
    spec.CopyFrom(DEFAULTS)
    spec.protocol_version = PROTOCOL_VERSION
    spec.run = spec.domain = spec.holdout.domain = spec.probe.domain = spec.train.domain = "d"
    sound = json.dumps({"version": 1, "name": "n", "extra": {}, "files": [], "tensors": []}).encode()
    spec.base.manifest.CopyFrom(world.put(sound if manifest is None else manifest))
    for name in ("probe", "train", "holdout"):
        getattr(spec, name).artifact.CopyFrom(world.put(corpora.get(name, text())))
    return spec


async def handled(world: World, spec: run_pb2.RunSpec) -> tuple[str, Any]:
    subject = fact("d", "run", 0, "created")
    data = seal(COORDINATOR, subject, run_pb2.RunCreated(spec=spec)).SerializeToString()
    selector = Selector(cast(Any, world), cast(Any, world), ROSTER, cast(Any, None), structlog.get_logger())
    await selector.handle(Record("RUNS", 1, subject, data, 0))
    return world.written[-1]


POISON: dict[str, dict[str, bytes]] = {
    **{f"{part} separated by {separator[:20]!r}": {part: text(separator)} for part in ("probe", "train", "holdout")
       for separator in ("abc", "1e3", str(2**40), "", "-1", "9" * 5000, str(VOCABULARY))},
    **{f"{part} of another base": {part: text(token=5000)} for part in ("train", "holdout")},
    **{f"{part} is {what[:20]!r}": {part: what} for part in ("probe", "train", "holdout")
       for what in (b"", b"{}", b"\xff" * 40, (1 << 40).to_bytes(8, "little"), b"[" * 100_000)},
    "train is too short": {"train": text(documents=0)},
    **{f"manifest is {what[:20]!r}": {"manifest": what} for what in (b"", b"[]", b"5", b"[" * 100_000, b'{"version":[1]}')},
}  # fmt: skip


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
async def test_what_nobody_could_read_ends_its_run(world: World, poison: dict[str, bytes]) -> None:
    kind, message = await handled(world, spec_of(world, **poison))
    assert kind == "selection_failed"
    # What comes after the check has no model here: it would be a fault.
    assert message.reason not in (reasons_pb2.REASON_UNSPECIFIED, reasons_pb2.REASON_FAULT)
    assert 10 < len(message.detail) < 1000
    assert "Traceback" not in message.detail


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), RuntimeError("device"), AssertionError("inside")])
async def test_a_fault_of_our_own_ends_the_run_that_shows_it(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def broken(source: Any, spec: Any) -> Any:
        raise error

    monkeypatch.setattr("services.selector.actions.fetch_base", broken)
    kind, message = await handled(world, spec_of(world))
    assert (kind, message.reason) == ("selection_failed", reasons_pb2.REASON_FAULT)
    assert type(error).__name__ in message.detail


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError(), Retry("the store is away")])
async def test_what_passes_is_no_verdict(world: World, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def broken(source: Any, spec: Any) -> Any:
        raise error

    monkeypatch.setattr("services.selector.actions.fetch_base", broken)
    with pytest.raises(type(error)) as told:
        await handled(world, spec_of(world))
    assert here_and_now(told.value) is not None, "the work queue tries it again"
    assert world.written == []


def test_sound_corpora_pass(world: World) -> None:
    spec = spec_of(world)
    paths = {name: world.folder / getattr(spec, name).artifact.digest for name in ("probe", "train", "holdout")}
    selecting.check_corpora(spec, {}, [paths["probe"], paths["train"]], {"d": paths["holdout"]})
