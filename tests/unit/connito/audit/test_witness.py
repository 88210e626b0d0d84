"""A witness cosigns what extends what it saw, and refuses a second history; what it or a miner kept proves one in an audit."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
from connito.audit.access import refuse_released
from connito.audit.audit import Audit, Options, audit
from connito.audit.evidence import read
from connito.audit.witness import Witness, held
from connito.bus.follow import CaughtUp
from connito.errors import Invalid, NotFound, Retry, VerificationFailed
from connito.runtime.progress import Notify, silent
from connito.v1 import run_pb2
from connito.wire.checkpoint import Checkpoint
from connito.wire.fact import Record
from connito.wire.heads import ingress_origin_of
from connito.wire.subjects import FactKey

from tests.unit.connito.audit.world import ROSTER, RUN, Cycle, World, identity, tell

ME = identity("witness")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


class WithoutB(Cycle):
    """The last cycle anew, as if B had never been in it."""

    def train(self) -> None:
        if self.number == 2:
            self.miners = ["A", "C"]
        super().train()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("other"), story=WithoutB)


async def items(records: list[Record]) -> AsyncGenerator[Record | CaughtUp, None]:
    """As they are followed: each stream in its order, one after the other."""
    for record in sorted(records, key=lambda record: record.stream):
        if record.stream != "INGRESS":
            yield record
    yield CaughtUp()


async def watch(records: list[Record], folder: Path, say: Notify = silent) -> int:
    witness = Witness(folder, ME, ROSTER, say, lambda: 1_700_000_000_000)
    await witness.watch(items(records), once=True)
    witness.check()
    return witness.cosigned


def up_to(world: World, ending: str) -> list[Record]:
    return world.records[: world.find(ending) + 1]


async def test_it_cosigns_each_head_once_and_goes_on_where_it_was(told: World, tmp_path: Path) -> None:
    said: list[str] = []
    assert await watch(up_to(told, "run.2.head"), tmp_path, said.append) == 2
    assert await watch(told.records, tmp_path, said.append) == 2
    assert await watch(told.records, tmp_path) == 0
    seen = [int(text.split()[1]) for text in said]
    assert seen == sorted(set(seen))
    kept = Checkpoint.parse((tmp_path / f"{RUN}.checkpoint").read_text())
    assert kept.size == seen[-1]
    assert kept.cosigners() == {ME.public: 1_700_000_000}


async def test_a_second_history_is_refused_whichever_came_first(told: World, other: World, tmp_path: Path) -> None:
    await watch(told.records, tmp_path)
    with pytest.raises(VerificationFailed, match="two histories"):
        await watch(other.records, tmp_path)
    assert (tmp_path / f"{RUN}.refused").exists()


async def test_a_refused_run_does_not_end_the_others(told: World, other: World, tmp_path: Path) -> None:
    """And what comes of it later is not cosigned either."""
    said: list[str] = []
    await watch(up_to(told, "run.2.head"), tmp_path)
    before = (tmp_path / f"{RUN}.checkpoint").read_text()
    (tmp_path / "gone.checkpoint").write_text(before)
    witness = Witness(tmp_path, ME, ROSTER, said.append, lambda: 1_700_000_000_000)
    await witness.watch(items(told.records), once=True)
    assert set(witness.refused) == {"gone"}
    assert witness.cosigned > 0, "of the other run"
    witness = Witness(tmp_path, ME, ROSTER, said.append, lambda: 1_700_000_000_000)
    await witness.watch(items(other.records), once=True)
    assert set(witness.refused) == {"gone", RUN}
    assert not witness.cosigned
    with pytest.raises(VerificationFailed, match=r"run-1: .*; gone: "):
        witness.check()


async def test_what_is_said_of_runs_that_do_not_exist_is_not_kept(told: World, tmp_path: Path) -> None:
    record = next(record for record in told.records if ".run.0.validator." in record.subject)
    ghosts = [replace(record, subject=record.subject.replace(RUN, f"ghost-{n}")) for n in range(50)]
    witness = Witness(tmp_path, ME, ROSTER, silent, lambda: 1_700_000_000_000)
    await witness.watch(items([*ghosts, *told.records]), once=True)
    assert set(witness._log.runs) == {RUN}
    trees = witness._log.trees
    assert trees is not None
    assert set(trees.runs) == {RUN}


async def test_a_log_that_ends_before_what_was_seen_is_refused(told: World, tmp_path: Path) -> None:
    await watch(told.records, tmp_path)
    with pytest.raises(VerificationFailed, match="ends before"):
        await watch(up_to(told, "run.2.head"), tmp_path)


@pytest.mark.parametrize("ending", ["commit.1.settled", "validate.1.drawn", "train.2.opened"])
async def test_a_log_without_one_of_its_messages_is_not_cosigned(told: World, tmp_path: Path, ending: str) -> None:
    world = told.copy()
    del world.records[world.find(ending)]
    with pytest.raises(VerificationFailed, match="not cosigned"):
        await watch(world.records, tmp_path)


async def look(world: World, folder: Path, notes: dict[str, str]) -> Audit:
    artifacts = await world.artifacts(folder)
    return audit(world.evidence(), artifacts, Options(model=False, tolerance=0.0, kept=notes))


async def test_what_a_witness_kept_proves_which_history_it_saw(told: World, other: World, tmp_path: Path) -> None:
    await watch(told.records, tmp_path)
    note = (tmp_path / f"{RUN}.checkpoint").read_text()
    assert (await look(told, tmp_path, {"kept": note})).differences == []
    found = await look(other, tmp_path, {"kept": note})
    assert [difference.check for difference in found.differences] == ["history"]
    assert found.blame == ["operator"]


async def test_what_a_miner_kept_proves_that_it_was_heard(told: World, other: World, tmp_path: Path) -> None:
    receipt = told.evidence().facts.received(3)
    assert receipt is not None
    note = receipt.message.checkpoint
    assert (await look(told, tmp_path, {"kept": note})).differences == []
    found = await look(other, tmp_path, {"kept": note})
    assert found.blame == ["operator"]
    assert "history" in {difference.check for difference in found.differences}


async def test_a_forged_receipt_proves_nothing(told: World, tmp_path: Path) -> None:
    receipt = told.evidence().facts.received(3)
    assert receipt is not None
    real = Checkpoint.parse(receipt.message.checkpoint)
    forged = Checkpoint(real.origin, real.size, b"x" * 32).signed(identity("miner A"))
    with pytest.raises(Invalid, match="proves nothing"):
        await look(told, tmp_path, {"kept": forged.note})
    elsewhere = Checkpoint("connito.v1/other/5f", 3, b"x" * 32).signed(identity("committer"))
    with pytest.raises(Invalid, match="nothing about this run"):
        await look(told, tmp_path, {"kept": elsewhere.note})


async def test_the_same_run_begun_anew_is_a_second_history(told: World, tmp_path: Path) -> None:
    origin = f"connito.v1/{RUN}/{'0' * 32}"
    note = Checkpoint(origin, 3, b"x" * 32).signed(identity("coordinator")).note
    found = await look(told, tmp_path, {"kept": note})
    assert [(one.check, one.by) for one in found.differences] == [("history", "operator")]


async def test_a_log_with_another_past_of_the_same_length_is_refused(told: World, tmp_path: Path) -> None:
    await watch(told.records, tmp_path)
    path = tmp_path / f"{RUN}.checkpoint"
    seen = Checkpoint.parse(path.read_text())
    path.write_text(Checkpoint(seen.origin, seen.size, b"x" * 32).signed(identity("coordinator")).note)
    with pytest.raises(VerificationFailed, match="not those seen before"):
        await watch(told.records, tmp_path)


def released(world: World) -> World:
    """After the operator said which file has the run, and its windows left the streams."""
    gone = world.copy()
    fact = run_pb2.RunArchived(run=RUN, digest="a" * 64, bytes=1, messages=len(gone.records), head="b" * 64)
    gone.store(f"connito.v1.{RUN}.library.0.archived", FactKey("library", 0, "archived"), fact, "operator")
    gone.records = [record for record in gone.records if record.stream in ("RUNS", "LIBRARY")]
    return gone


async def test_a_run_that_was_released_before_it_was_seen_is_left_and_said(told: World, tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        assert await watch(released(told).records, tmp_path, said.append) == 0
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 2
    assert "not cosigned, its operator has released it into an archive with SHA-256 " + "a" * 64 in said[0]


async def test_the_release_of_a_run_that_was_seen_needs_the_operators_word(told: World, tmp_path: Path) -> None:
    await watch(told.records, tmp_path)
    before, said = (tmp_path / f"{RUN}.checkpoint").read_text(), list[str]()
    assert await watch(released(told).records, tmp_path, said.append) == 0
    assert "--checkpoint" in said[0]
    assert (tmp_path / f"{RUN}.checkpoint").read_text() == before
    without = [record for record in released(told).records if not record.subject.endswith("library.0.archived")]
    with pytest.raises(VerificationFailed, match="stands for what is not shown"):
        await watch(without, tmp_path)


def test_what_was_released_is_found_in_its_file_alone(told: World) -> None:
    refuse_released(told.evidence().facts)
    with pytest.raises(NotFound, match="give that file with --from"):
        refuse_released(released(told).evidence().facts)


async def test_a_release_hides_no_second_history(told: World, other: World, tmp_path: Path) -> None:
    await watch(told.records, tmp_path)
    with pytest.raises(VerificationFailed, match="not among those in the log"):
        await watch(released(other).records, tmp_path)


async def test_a_run_that_left_the_log_as_a_whole_is_missed(told: World, tmp_path: Path) -> None:
    await watch(told.records, tmp_path)
    with pytest.raises(VerificationFailed, match="the log does not hold it"):
        await watch([], tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"no checkpoint\n", b"x" * 1_000_000])
async def test_damaged_memory_is_told_and_accuses_nobody(told: World, tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{RUN}.checkpoint").write_bytes(content)
    with pytest.raises(Invalid, match="is damaged") as caught:
        await watch(told.records, tmp_path)
    assert not isinstance(caught.value, VerificationFailed)
    assert not (tmp_path / f"{RUN}.refused").exists()


async def test_a_file_is_no_folder_to_remember_in(told: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Invalid, match="give a folder"), held(tmp_path / "file"):
        await watch(told.records, tmp_path / "file")


async def test_a_head_of_messages_that_are_held_back_is_not_passed_over(told: World, tmp_path: Path) -> None:
    """What it stands for may be on its way, and is not for ever."""
    last = max((one for one in told.records if one.stream == "VALIDATE"), key=lambda one: one.sequence)
    with pytest.raises(VerificationFailed, match="stands for what is not shown: VALIDATE was read up to"):
        await watch([one for one in told.records if one is not last], tmp_path)
    assert await watch(told.records, tmp_path) > 0


async def test_memory_of_another_platform_accuses_nobody(told: World, tmp_path: Path) -> None:
    note = Checkpoint(f"connito.v1/{RUN}/{'0' * 32}", 3, b"x" * 32).signed(identity("another platform")).note
    (tmp_path / f"{RUN}.checkpoint").write_text(note)
    with pytest.raises(Invalid, match="of another platform") as caught:
        await watch(told.records, tmp_path)
    assert not isinstance(caught.value, VerificationFailed)


async def test_what_was_refused_stays_refused(told: World, other: World, tmp_path: Path) -> None:
    """A later start is shown the first history again: the proof of the second one stands."""
    await watch(up_to(told, "run.2.head"), tmp_path)
    with pytest.raises(VerificationFailed, match="two histories"):
        await watch(other.records, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(VerificationFailed, match="two histories of this run were shown before"):
        await watch(told.records, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_witnesses_share_no_memory(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(Retry, match="another witness remembers"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


async def test_what_a_retired_key_signed_counts_and_is_said_to_be_its(told: World, tmp_path: Path) -> None:
    """Nothing dates a checkpoint. If retiring a key voided its words, an operator would retire the one that lied."""
    old = identity("an old committer")
    note = Checkpoint(ingress_origin_of(told.evidence().facts), 1, b"x" * 32).signed(old).note
    with pytest.raises(Invalid, match="proves nothing"):
        await look(told, tmp_path, {"kept": note})
    evidence = read(RUN, told.records, replace(ROSTER, retired={old.public: ("committer", 1)}))
    found_out = audit(
        evidence, await told.artifacts(tmp_path), Options(model=False, tolerance=0.0, kept={"kept": note})
    )
    (found,) = [one for one in found_out.differences if one.check == "history"]
    assert found.by == "operator"
    assert "by a key that is retired" in found.what
