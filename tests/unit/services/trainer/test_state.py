"""The private work folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from connito.errors import Fatal, Invalid

from services.trainer.state import Ledger, read_progress


def test_progress_survives_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "UME")
    ledger.artifact_path("r", 1).write_bytes(b"xyz")
    ledger.update("r", 1, artifact="ab", size=3)
    ledger.update("r", 1, said=True, told=("commit-accepted",))
    ledger.close()
    again = Ledger(tmp_path, "UME").cycle("r", 1)
    assert (again.artifact, again.size, again.said, again.told) == ("ab", 3, True, ("commit-accepted",))


def test_two_trainers_cannot_share_a_folder(tmp_path: Path) -> None:
    first = Ledger(tmp_path, "UME")
    with pytest.raises(Fatal, match="CONNITO_WORK_DIR"):
        Ledger(tmp_path, "UME")
    first.close()
    Ledger(tmp_path, "UME").close()


def test_another_keys_progress_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    first = Ledger(tmp_path, "UME")
    first.update("r", 1, artifact="ab")
    first.close()
    assert Ledger(tmp_path, "UOTHER").progress("r") == {}


def test_a_crash_before_the_rename_leaves_no_artifact(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "UME")
    draft = ledger.folder("r", 1) / "draft"
    draft.write_bytes(b"half")
    assert not ledger.artifact_path("r", 1).exists()
    assert ledger.cycle("r", 1).artifact == ""
    assert ledger.keep_artifact("r", 1, draft).read_bytes() == b"half"
    assert not draft.exists()


def test_an_artifact_that_was_removed_is_not_claimed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "UME")
    ledger.update("r", 1, artifact="ab", size=3, commitment="cd", committed=True)
    ledger.close()
    again = Ledger(tmp_path, "UME").cycle("r", 1)
    assert (again.artifact, again.commitment, again.committed) == ("", "", True)


def test_a_torn_temporary_file_is_ignored(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "UME")
    ledger.update("r", 1, steps=7)
    (ledger.folder("r", 1) / "progress.json.tmp").write_text("{")
    ledger.close()
    assert Ledger(tmp_path, "UME").cycle("r", 1).steps == 7


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda good: good[: len(good) // 2],
    "empty": lambda _: b"",
    "zeros, as after a power cut": lambda good: bytes(len(good)),
    "a list": lambda _: b"[]",
    "a number for a cycle's digest": lambda good: good.replace(b'"ab"', b"7"),
    "words for the cycle": lambda good: good.replace(b'"cycle": 1', b'"cycle": "one"'),
    "nested without end": lambda _: b"[" * 100_000,
    "no text": lambda _: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_named_and_costs_its_cycle_alone(how: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "UME")
    for cycle in (1, 2):
        ledger.artifact_path("r", cycle).write_bytes(b"xyz")
        ledger.update("r", cycle, artifact="ab", size=3)
    ledger.close()
    path = tmp_path / "r" / "1" / "progress.json"
    path.write_bytes(DAMAGED[how](path.read_bytes()))
    with pytest.raises(Invalid, match=r"progress\.json is not a miner's progress"):
        read_progress(path)
    again = Ledger(tmp_path, "UME")
    assert list(again.progress("r")) == [2]
    assert again.cycle("r", 1).artifact == ""
    assert path.with_suffix(".damaged").exists()
    again.update("r", 1, steps=3)
    again.close()
    assert Ledger(tmp_path, "UME").cycle("r", 1).steps == 3


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "UME")
    (ledger.folder("r", 1) / "progress.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        ledger.progress("r")


def test_pruning_forgets_old_cycles_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "UME")
    for cycle in (1, 2, 3):
        ledger.update("r", cycle, artifact="ab")
    ledger.prune("r", 3)
    assert list(ledger.progress("r")) == [3]
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["3"]
