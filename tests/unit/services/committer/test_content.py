"""Looking into artifacts: once each, and whatever is in them."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import numpy as np
import pytest
from connito.errors import Environment, ObjectDamaged, ObjectMissing, Retry, Unusable
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts
from connito.wire.locked import lock_file
from safetensors.numpy import save

from services.committer import content
from services.committer.content import ContentCheck
from tests.unit.services.committer.ledger import Ledger, artifact, theta

STATE = {"layers.0.up_proj": np.ones((2, 4, 4), dtype=np.float32)}


class Shelf:
    """A store that is a folder, and that fails on demand. What the real one does is in tests/integration."""

    def __init__(self, folder: Path, good: bytes) -> None:
        self.good, self.upload = folder / "good", folder / "upload"
        self.good.write_bytes(good)
        self.fetched, self.began, self.size = 0, list[str](), 0
        self.states: dict[str, Path] = {}
        self.failure: Exception | None = None

    async def stat(self, ref: ArtifactRef) -> int | None:
        return (self.size or ref.size) if self.upload.exists() else None

    async def fetch(self, ref: ArtifactRef, *, stored: bool = False) -> Path:
        if ref.digest != artifact("ma", 1).digest:
            self.began.append(ref.digest)
            return self.states.get(ref.digest, self.good)
        assert stored, "what another realm has in the cache was not uploaded"
        return await self._uploaded()

    async def get_bytes(self, ref: ArtifactRef) -> bytes:
        return (await self._uploaded()).read_bytes()

    async def _uploaded(self) -> Path:
        if not self.upload.exists():
            raise ObjectMissing("nothing was uploaded")
        self.fetched += 1
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return self.upload


@pytest.fixture
def facts() -> RunFacts:
    ledger = Ledger()
    spec = ledger.facts.spec
    assert spec is not None
    spec.scoring.max_relative_norm = 0.5
    return ledger.facts


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path, save(STATE))


@pytest.fixture(params=[0, content.SMALL], ids=["a file", "in memory"])
def check(shelf: Shelf, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ContentCheck:
    monkeypatch.setattr(content, "SMALL", request.param)
    return ContentCheck(shelf, 2)  # type: ignore[arg-type]


async def test_a_good_artifact_is_examined_once_however_many_ask(
    facts: RunFacts, shelf: Shelf, check: ContentCheck
) -> None:
    shelf.upload.write_bytes(save(STATE))
    answers = await asyncio.gather(*(check(facts, artifact("ma", 1), theta(1)) for _ in range(5)))
    assert answers == [None] * 5
    assert await check(facts, artifact("ma", 1), theta(1)) is None
    assert shelf.fetched == 1


async def test_a_small_upload_makes_no_file(facts: RunFacts, shelf: Shelf) -> None:
    """Some hundred thousand miners a day would leave as many in the cache, each dearer to make than to examine."""
    shelf.upload.write_bytes(save(STATE))
    large = artifact("ma", 1, content.SMALL + 1)
    shelf.fetch = None  # type: ignore[assignment]
    check = ContentCheck(shelf, 2)  # type: ignore[arg-type]
    check._bases[theta(1).digest] = shelf.good
    assert await check(facts, artifact("ma", 1), theta(1)) is None
    check._verdicts.clear()
    with pytest.raises(TypeError):
        await check(facts, large, theta(1))


async def test_what_is_missing_is_looked_for_again(facts: RunFacts, shelf: Shelf, check: ContentCheck) -> None:
    refusal = await check(facts, artifact("ma", 1), theta(1))
    assert refusal is not None
    assert refusal.reason == reasons_pb2.REASON_ARTIFACT_MISSING
    shelf.upload.write_bytes(save(STATE))
    assert await check(facts, artifact("ma", 1), theta(1)) is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", reasons_pb2.REASON_BAD_HEADER),
        (b"\xff" * 64, reasons_pb2.REASON_BAD_HEADER),
        (save({"layers.0.up_proj": STATE["layers.0.up_proj"] * np.inf}), reasons_pb2.REASON_NON_FINITE),
        (save({"layers.0.up_proj": STATE["layers.0.up_proj"] * 2}), reasons_pb2.REASON_NORM_EXCEEDED),
        (save({"layers.1.up_proj": STATE["layers.0.up_proj"]}), reasons_pb2.REASON_WRONG_TENSORS),
        (save({"layers.0.up_proj": STATE["layers.0.up_proj"].astype(np.float16)}), reasons_pb2.REASON_WRONG_DTYPE),
    ],
)
async def test_bad_content_is_refused_with_its_reason(
    facts: RunFacts, shelf: Shelf, check: ContentCheck, data: bytes, expected: int
) -> None:
    shelf.upload.write_bytes(data)
    refusal = await check(facts, artifact("ma", 1), theta(1))
    assert refusal is not None
    assert refusal.reason == expected


async def test_a_file_that_breaks_the_examination_is_refused_too(
    facts: RunFacts, shelf: Shelf, check: ContentCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(content, "validate_move", burst)
    shelf.upload.write_bytes(save(STATE))
    refusal = await check(facts, artifact("ma", 1), theta(1))
    assert refusal is not None
    assert refusal.reason == reasons_pb2.REASON_BAD_HEADER


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ObjectDamaged("other bytes"), reasons_pb2.REASON_DIGEST_MISMATCH),
    ],
)
async def test_what_the_store_says_about_the_artifact_is_told_to_the_miner(
    facts: RunFacts, shelf: Shelf, check: ContentCheck, failure: Exception, expected: int
) -> None:
    shelf.upload.write_bytes(save(STATE))
    shelf.failure = failure
    refusal = await check(facts, artifact("ma", 1), theta(1))
    assert refusal is not None
    assert refusal.reason == expected


@pytest.mark.parametrize(
    "failure",
    [
        Retry("the store is away"),
        Unusable("the disk is full", dependency="disk", reason=reasons_pb2.REASON_STORE_UNAVAILABLE),
        ObjectMissing("it was there a moment ago"),
    ],
)
async def test_trouble_on_this_side_is_nobody_s_fault_and_passes(
    facts: RunFacts, shelf: Shelf, check: ContentCheck, failure: Exception
) -> None:
    shelf.upload.write_bytes(save(STATE))
    shelf.failure = failure
    with pytest.raises(Environment):
        await check(facts, artifact("ma", 1), theta(1))
    shelf.failure = None
    assert await check(facts, artifact("ma", 1), theta(1)) is None


@pytest.mark.parametrize("cycle", [2, 30])
async def test_a_submission_is_measured_from_the_state_that_its_own_cycle_started_from(
    facts: RunFacts, shelf: Shelf, check: ContentCheck, tmp_path: Path, cycle: int
) -> None:
    """After `cycle` steps of 4 % each the run is far from where it began, and each submission no further than ever."""
    moved = {name: value * 1.04**cycle * 1.6 for name, value in STATE.items()}
    shelf.states[theta(cycle).digest] = tmp_path / "state"
    (tmp_path / "state").write_bytes(save(moved))
    shelf.upload.write_bytes(save({name: value * np.float32(1.04) for name, value in moved.items()}))
    assert await check(facts, artifact("ma", 1), theta(cycle)) is None
    # The very same bytes as work on θ_0 would be a leap.
    refusal = await check(facts, artifact("ma", 1), theta(1))
    assert refusal is not None
    assert refusal.reason == reasons_pb2.REASON_NORM_EXCEEDED


async def test_the_state_of_a_cycle_is_hashed_once_and_again_before_a_refusal(
    facts: RunFacts, shelf: Shelf, check: ContentCheck
) -> None:
    shelf.upload.write_bytes(save(STATE))
    for _ in range(3):
        check._verdicts.clear()
        assert await check(facts, artifact("ma", 1), theta(1)) is None
    assert shelf.began == [theta(1).digest]
    # The disk returns other bytes, from which this would be a leap; what is fetched anew is right again.
    shelf.good.write_bytes(save({name: value * 9 for name, value in STATE.items()}))
    shelf.states[theta(1).digest] = shelf.upload
    check._verdicts.clear()
    assert await check(facts, artifact("ma", 1), theta(1)) is None
    assert shelf.began == [theta(1).digest] * 2


async def test_a_state_is_hashed_once_for_all_that_are_examined_at_once(facts: RunFacts, shelf: Shelf) -> None:
    shelf.upload.write_bytes(save(STATE))
    check = ContentCheck(shelf, 4)  # type: ignore[arg-type]
    assert await check(facts, artifact("ma", 1), theta(1)) is None
    assert len(shelf.began) == 1
    uploads = [ArtifactRef(digest=f"{number:064x}", size=number) for number in range(1, 9)]

    async def uploaded(_ref: ArtifactRef) -> bytes:
        return shelf.upload.read_bytes()

    shelf.get_bytes = uploaded  # type: ignore[assignment]
    assert await asyncio.gather(*(check(facts, upload, theta(1)) for upload in uploads)) == [None] * 8
    assert len(shelf.began) == 1


async def test_a_state_that_is_gone_from_the_cache_is_fetched_again(
    facts: RunFacts, shelf: Shelf, check: ContentCheck
) -> None:
    shelf.upload.write_bytes(save(STATE))
    assert await check(facts, artifact("ma", 1), theta(1)) is None
    check._verdicts.clear()
    shelf.states[theta(1).digest] = shelf.good.rename(shelf.good.with_name("again"))
    assert await check(facts, artifact("ma", 1), theta(1)) is None


@pytest.mark.parametrize("failure", [Retry("the download ended early"), ObjectDamaged("longer than it was said")])
async def test_an_object_of_another_size_than_was_said_is_refused(
    facts: RunFacts, shelf: Shelf, check: ContentCheck, failure: Exception
) -> None:
    shelf.upload.write_bytes(save(STATE))
    shelf.failure, shelf.size = failure, artifact("ma", 1).size - 1
    refusal = await check(facts, artifact("ma", 1), theta(1))
    assert refusal is not None
    assert refusal.reason == reasons_pb2.REASON_DIGEST_MISMATCH
    assert refusal.finding.count == shelf.size


def locked_upload(shelf: Shelf, state: dict[str, np.ndarray]) -> ArtifactRef:
    rows = save(state)
    (shelf.upload.parent / "rows").write_bytes(rows)
    content = hashlib.sha256(rows).hexdigest()
    lock_file(shelf.upload.parent / "rows", shelf.upload, b"k" * 32, content)
    ref = artifact("ma", 1, shelf.upload.stat().st_size)
    ref.key, ref.content = b"k" * 32, content
    return ref


async def test_a_locked_upload_is_looked_into_with_the_key_of_its_reveal(
    facts: RunFacts, shelf: Shelf, check: ContentCheck
) -> None:
    assert await check(facts, locked_upload(shelf, STATE), theta(1)) is None
    broken = {name: np.full_like(rows, np.nan) for name, rows in STATE.items()}
    refusal = await check(facts, locked_upload(shelf, broken), theta(1))
    assert refusal is not None
    assert refusal.reason == reasons_pb2.REASON_NON_FINITE


async def test_a_wrong_key_is_its_senders_fault_and_nobody_elses(
    facts: RunFacts, shelf: Shelf, check: ContentCheck
) -> None:
    good = locked_upload(shelf, STATE)
    wrong = ArtifactRef()
    wrong.CopyFrom(good)
    wrong.key = b"x" * 32
    for ref in (wrong, ArtifactRef(digest=good.digest, size=good.size, realm=good.realm)):
        refusal = await check(facts, ref, theta(1))
        assert refusal is not None
        assert refusal.reason == (reasons_pb2.REASON_KEY_MISMATCH if ref.key else reasons_pb2.REASON_BAD_HEADER)
    assert await check(facts, good, theta(1)) is None, "who named it first with another key does not decide"
