"""Validators of one owner measure a state on a part of the draw once; nobody else can say what they find."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from connito.protocol.scoring.evaluation import Losses
from connito.workloads.shared_losses import MOST, SharedLosses

ROWS = np.arange(12, dtype=np.int64).reshape(3, 4)
FOUND = Losses(np.array([1.25, 1 / 3, 7e-300]), np.array([3, 3, 2]))


def counting(calls: list[int], found: Losses = FOUND) -> Callable[[], Losses]:
    def measure() -> Losses:
        calls.append(1)
        return found

    return measure


def never() -> Losses:
    raise AssertionError("this is known")


def same(left: Losses, right: Losses) -> bool:
    return left.sums.tobytes() == right.sums.tobytes() and left.tokens.tolist() == right.tokens.tolist()


def test_another_process_finds_the_losses_to_the_last_bit(tmp_path: Path) -> None:
    assert same(SharedLosses(tmp_path / "losses", "r", "model").of("state", ROWS, counting([])), FOUND)
    assert same(SharedLosses(tmp_path / "losses", "r", "model").of("state", ROWS, never), FOUND)


def test_counted_tokens_are_shared_too_and_apart_from_losses(tmp_path: Path) -> None:
    counts = {3: [5, 0], 11: [7, 2]}
    first = SharedLosses(tmp_path / "losses", "r", "model")
    first.of("state", ROWS, counting([]))
    assert first.counts("state", ROWS, lambda: counts) == counts
    second = SharedLosses(tmp_path / "losses", "r", "model")
    assert second.counts("state", ROWS, dict) == counts
    assert second.counts("state", ROWS[:2], lambda: {3: [1, 1]}) == {3: [1, 1]}
    assert second.counts("", ROWS, lambda: {3: [9, 9]}) == {3: [9, 9]}


@pytest.mark.parametrize(
    ("run", "judge", "state", "rows"),
    [
        ("r2", "model", "state", ROWS),
        ("r", "other model", "state", ROWS),
        ("r", "model", "other state", ROWS),
        ("r", "model", "state", ROWS[:2]),
        ("r", "model", "state", ROWS + 1),
        ("r", "model", "state", ROWS.astype(np.int32)),
    ],
)
def test_what_the_losses_follow_from_is_in_their_name(
    tmp_path: Path, run: str, judge: str, state: str, rows: np.ndarray
) -> None:
    SharedLosses(tmp_path / "losses", "r", "model").of("state", ROWS, counting([]))
    calls: list[int] = []
    SharedLosses(tmp_path / "losses", run, judge).of(state, rows, counting(calls))
    assert calls == [1]


def test_a_state_without_a_name_and_a_validator_without_a_folder_share_nothing(tmp_path: Path) -> None:
    calls: list[int] = []
    for shared, name in ((SharedLosses(tmp_path / "losses", "r"), ""), (SharedLosses(None, "r"), "state")):
        for _ in range(2):
            shared.of(name, ROWS, counting(calls))
    assert len(calls) == 4


def test_nothing_is_taken_from_a_folder_that_others_may_write_to(tmp_path: Path) -> None:
    folder = tmp_path / "losses"
    SharedLosses(folder, "r").of("state", ROWS, counting([], Losses(FOUND.sums - 1, FOUND.tokens)))
    for place in (folder, folder / "r"):
        place.chmod(0o777)
        assert same(SharedLosses(folder, "r").of("state", ROWS, counting([])), FOUND)
        place.chmod(0o700)


def test_nothing_is_taken_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "theirs"
    SharedLosses(elsewhere, "r").of("state", ROWS, counting([], Losses(FOUND.sums - 1, FOUND.tokens)))
    (tmp_path / "losses").symlink_to(elsewhere)
    assert same(SharedLosses(tmp_path / "losses", "r").of("state", ROWS, counting([])), FOUND)


@pytest.mark.parametrize("damage", [b"", b"\0" * 10, b"\0" * 80])
def test_what_a_crash_left_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    shared = SharedLosses(tmp_path / "losses", "r")
    shared.of("state", ROWS, counting([]))
    (kept,) = (path for path in (tmp_path / "losses" / "r").iterdir() if not path.suffix)
    kept.write_bytes(damage)
    assert same(shared.of("state", ROWS, counting([])), FOUND)
    assert same(shared.of("state", ROWS, never), FOUND)


def test_who_comes_while_another_measures_waits_for_it(tmp_path: Path) -> None:
    begun, calls = threading.Event(), list[int]()

    def slowly() -> Losses:
        begun.set()
        calls.append(1)
        return FOUND

    def second() -> Losses:
        begun.wait(10)
        return SharedLosses(tmp_path / "losses", "r").of("state", ROWS, slowly)

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(second) for _ in range(2)]
        SharedLosses(tmp_path / "losses", "r").of("state", ROWS, slowly)
        assert all(same(other.result(), FOUND) for other in others)
    assert calls == [1]


def test_a_full_or_missing_disk_costs_time_alone(tmp_path: Path) -> None:
    (tmp_path / "losses").write_text("a file where the folder would be")
    assert same(SharedLosses(tmp_path / "losses", "r").of("state", ROWS, counting([])), FOUND)


def test_a_long_run_keeps_what_was_measured_last(tmp_path: Path) -> None:
    shared = SharedLosses(tmp_path / "losses", "r", "model")
    for number in range(MOST):
        shared.of(f"state {number}", ROWS, counting([]))
    files = list((tmp_path / "losses" / "r").iterdir())
    assert MOST <= len(files) <= 1.1 * MOST + 2
    assert same(shared.of(f"state {MOST - 1}", ROWS, never), FOUND)
    again: list[int] = []
    shared.of("state 0", ROWS, counting(again))
    assert again


def test_an_ended_run_leaves_nothing(tmp_path: Path) -> None:
    shared = SharedLosses(tmp_path / "losses", "r")
    shared.of("state", ROWS, counting([]))
    shared.close()
    assert not (tmp_path / "losses" / "r").exists()
