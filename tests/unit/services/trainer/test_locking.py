"""What a miner uploads is locked until it reveals: the key goes out with the reveal, and with nothing before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from connito.protocol.commitment import opens
from connito.store import ref_of_file
from connito.store.cache import Cache
from connito.v1 import services_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC
from connito.wire.identity import Identity
from connito.wire.locked import unlocked
from google.protobuf.message import Message

from services.trainer.actions import Miner
from services.trainer.handlers import Commit, Reveal, Train
from services.trainer.state import Ledger
from services.trainer.strategy import HONEST, Effort
from tests.support.run import RUN, Run

KEY = Identity.generate(b"m" * 32)
ROWS = b"rows that were trained" * 1000


@dataclass
class World:
    """All that is said and uploaded; whatever a miner has, its folder keeps it."""

    folder: Path
    facts: Any
    identity: Identity = KEY
    said: list[Message] = field(default_factory=list)
    asked: list[services_pb2.UploadCommand] = field(default_factory=list)
    uploads: list[bytes] = field(default_factory=list)

    @property
    def cache(self) -> Cache:
        return Cache(self.folder / "cache")

    async def publish_ingress(self, _run: str, _kind: str, message: Message) -> int:
        self.said.append(message)
        return len(self.said)

    async def fetch(self, _run: str, _ref: object) -> Path:
        return self.folder / "state"

    async def train(self, _facts: object, _cycle: int, _state: Path, draft: Path) -> Effort:
        draft.write_bytes(ROWS)
        return Effort(1, 1, 1.0)

    async def upload_slot(self, command: services_pb2.UploadCommand) -> services_pb2.RequestUploadResponse:
        self.asked.append(command)
        return services_pb2.RequestUploadResponse(url="u")

    async def upload(self, _slot: object, path: Path) -> bool:
        self.uploads.append(path.read_bytes())
        return True

    async def step(self, payload: object) -> None:
        """Do one thing as a miner that was started just now."""
        ledger = Ledger(self.folder / "work", KEY.public)
        try:
            miner: Any = Miner(self, self, self, ledger, self, HONEST, lambda _: self.facts)  # type: ignore[arg-type]
            await miner.perform(Action(payload))
        finally:
            ledger.close()


@dataclass
class Action:
    """What the engine gives to perform."""

    payload: object
    run: str = RUN


async def test_the_key_is_told_by_the_reveal_alone(story: Run, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"state")
    state = ref_of_file(tmp_path / "state", "", REALM_PUBLIC)
    story.facts.require_selection().initial_state.CopyFrom(state)
    story.opened("train", state=state)
    world = World(tmp_path, story.facts)
    for payload in (Train(1), Commit(1), Reveal(1)):
        await world.step(payload)
    commitment, reveal = world.said
    told, (upload,), (asked,) = reveal.artifact, world.uploads, world.asked  # type: ignore[attr-defined]
    assert opens(commitment.digest, RUN, 1, KEY.public, state.digest, told.digest, reveal.salt)  # type: ignore[attr-defined]
    assert not asked.artifact.key
    assert not asked.artifact.content
    (tmp_path / "upload").write_bytes(upload)
    assert ref_of_file(tmp_path / "upload", "", REALM_PUBLIC).digest == told.digest
    assert told.key
    assert ROWS[:32] not in upload
    assert unlocked(tmp_path / "upload", told, tmp_path).read_bytes() == ROWS
    assert all(told.key not in said.SerializeToString() for said in (commitment, *world.asked))


async def test_work_that_is_made_again_has_the_same_upload_and_other_work_another_key(
    story: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_bytes(b"state")
    state = ref_of_file(tmp_path / "state", "", REALM_PUBLIC)
    story.facts.require_selection().initial_state.CopyFrom(state)
    story.opened("train", state=state)
    seen = []
    for rows in (ROWS, ROWS, ROWS + b"more"):
        monkeypatch.setitem(globals(), "ROWS", rows)
        world = World(tmp_path, story.facts)
        await world.step(Train(1))
        ledger = Ledger(tmp_path / "work", KEY.public)
        seen.append(ledger.cycle(RUN, 1))
        ledger.close()
    assert (seen[0].artifact, seen[0].key) == (seen[1].artifact, seen[1].key)
    assert seen[2].key not in ("", seen[0].key)
