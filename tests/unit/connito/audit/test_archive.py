"""A run in one file: what was put in comes out, the same bytes each time, and whatever else it may be is said in a sentence."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from connito.audit.archive import seal, unsealed
from connito.audit.audit import Options, audit
from connito.audit.evidence import Stored
from connito.errors import ConnitoError, Invalid, NotFound
from connito.runtime.progress import silent
from connito.store.named import key_of

from .world import ROSTER, RUN, World, tell


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


@pytest.fixture
def world(told: World) -> World:
    return told.copy()


async def sealed(world: World, folder: Path, name: str = "run.zip") -> Path:
    folder.mkdir(exist_ok=True)
    fetched = await world.artifacts(folder)
    objects = {key_of(entry.ref): fetched.paths[entry.ref.digest] for entry in fetched.named}
    path = folder / name
    seal(path, RUN, Stored(world.records, [], []), ROSTER, objects)
    return path


async def audited(path: Path, folder: Path) -> list[str]:
    """The differences that an audit of the archive finds."""
    folder.mkdir(exist_ok=True)
    with unsealed(path, folder) as archive:
        evidence = await archive.evidence(RUN)
        artifacts = await archive.artifacts(evidence, lambda _: True, silent)
        return [str(one) for one in audit(evidence, artifacts, Options(model=False)).differences]


async def test_it_holds_what_an_audit_needs(world: World, tmp_path: Path) -> None:
    path = await sealed(world, tmp_path / "a")
    assert path.stat().st_mode & 0o777 == 0o600, "what a private run made is in clear there"
    fetched = await world.artifacts(tmp_path / "a")
    live = [str(one) for one in audit(world.evidence(), fetched, Options(model=False)).differences]
    with unsealed(path, tmp_path) as archive:
        assert archive.stored().records == sorted(world.records, key=lambda record: (record.stream, record.sequence))
        with pytest.raises(NotFound, match="not of 'another'"):
            await archive.evidence("another")
    assert await audited(path, tmp_path / "b") == live


async def test_the_same_run_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    first = (await sealed(world, tmp_path / "a")).read_bytes()
    world.records.reverse()
    assert (await sealed(world, tmp_path / "b")).read_bytes() == first
    assert not list(tmp_path.glob("*/.*")), "nothing half written is left"


async def test_cut_off_anywhere_it_is_no_archive(world: World, tmp_path: Path) -> None:
    whole = (await sealed(world, tmp_path / "a")).read_bytes()
    for cut in (0, 1, 30, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path = tmp_path / "cut.zip"
        path.write_bytes(whole[:cut])
        with pytest.raises(ConnitoError, match="not a whole archive"):
            await audited(path, tmp_path / "b")


@pytest.mark.slow
async def test_a_flipped_byte_of_any_file_in_it_is_found(world: World, tmp_path: Path) -> None:
    whole = (await sealed(world, tmp_path / "a")).read_bytes()
    clean = await audited(tmp_path / "a" / "run.zip", tmp_path / "b")
    path = tmp_path / "flipped.zip"
    for info in zipfile.ZipFile(tmp_path / "a" / "run.zip").infolist():
        end = whole.index(info.filename.encode(), info.header_offset) + len(info.filename) + 20 + info.file_size
        damaged = bytearray(whole)
        damaged[end - info.file_size // 2 - 1] ^= 0x20
        path.write_bytes(damaged)
        try:
            found = await audited(path, tmp_path / "b")
        except ConnitoError:
            continue
        assert found != clean, info.filename


Change = Callable[[dict[str, bytes]], object]
HOSTILE: dict[str, Change] = {
    "no roster": lambda files: files.pop("roster.json"),
    "no log": lambda files: files.pop("log.jsonl"),
    "no description": lambda files: files.pop("archive.json"),
    "a description that is none": lambda files: files.update({"archive.json": b"[1]"}),
    "a newer format": lambda files: files.update({"archive.json": b'{"format": 2, "run": "run-1"}'}),
    "a log of something else": lambda files: files.update({"log.jsonl": b'{"list": "records"}\n'}),
    "a log that is not text": lambda files: files.update({"log.jsonl": b"\xff\x00\n"}),
    "another list": lambda files: files.update({"log.jsonl": files["log.jsonl"].replace(b'"records"', b'"others"')}),
    "a log of numbers": lambda files: files.update({"log.jsonl": b"1\n"}),
    "data that is not base64": lambda files: files.update(
        {"log.jsonl": files["log.jsonl"].replace(b'"data": "', b'"data": "*')}
    ),
    "a roster of something else": lambda files: files.update({"roster.json": b"{}"}),
    "a sequence without an end": lambda files: files.update({"log.jsonl": first(files, sequence=float("inf"))}),
    "a sequence that no broker counts": lambda files: files.update({"log.jsonl": first(files, sequence=1 << 64)}),
    "a time after the calendar's": lambda files: files.update({"log.jsonl": first(files, ms=10**18)}),
    "a time before all times": lambda files: files.update({"log.jsonl": first(files, ms=-1)}),
    "a subject that is a number": lambda files: files.update({"log.jsonl": first(files, subject=7)}),
    "a stream that is a list": lambda files: files.update({"log.jsonl": first(files, stream=["RUNS"])}),
    "a log that is nested": lambda files: files.update({"log.jsonl": b"[" * 200_000 + b"\n"}),
}


def first(files: Mapping[str, bytes], **changed: object) -> bytes:
    """The log with its first message changed."""
    line, _, rest = files["log.jsonl"].partition(b"\n")
    return json.dumps({**json.loads(line), **changed}).encode() + b"\n" + rest


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_somebody_else_put_together_is_refused_in_a_sentence(
    world: World, tmp_path: Path, name: str
) -> None:
    path = await sealed(world, tmp_path / "a")
    with zipfile.ZipFile(path) as whole:
        files = {one: whole.read(one) for one in whole.namelist()}
    HOSTILE[name](files)
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as out:
        for one, data in files.items():
            out.writestr(one, data)
    try:
        said = "; ".join(await audited(other, tmp_path / "b"))
    except ConnitoError as error:
        said = str(error)
    assert said, "it passed for the archive that it is not"
    assert "\n" not in said


@pytest.mark.parametrize("inflating", ["log.jsonl", "roster.json", "archive.json", "an object"])
async def test_nothing_that_inflates_is_unpacked(world: World, tmp_path: Path, inflating: str) -> None:
    path = await sealed(world, tmp_path / "a")
    bomb = key_of(world.evidence().facts.require_selection().report) if inflating == "an object" else inflating
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(other, "w") as out:
        for one in whole.namelist():
            if one == bomb:
                out.writestr(one, bytes(64 << 20), zipfile.ZIP_DEFLATED)
            else:
                out.writestr(one, whole.read(one))
    with pytest.raises(Invalid, match="something in it is compressed"):
        await audited(other, tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


async def test_what_lies_beside_the_run_is_not_unpacked(world: World, tmp_path: Path) -> None:
    path = await sealed(world, tmp_path / "a")
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("../../escaped", b"x")
    await audited(path, tmp_path / "b")
    assert not list(tmp_path.parent.glob("**/escaped"))
