"""A run in which too few can act is waited for no longer than that may pass by itself."""

from __future__ import annotations

import io

from connito.client.waiting import PROCESS, Wait
from connito.errors import Fatal, Retry
from connito.local.display import PlainDisplay
from connito.local.hindered import GIVEN_UP_SECONDS, HINDERED_SECONDS, Group, Hindered

MINERS = frozenset({"miner-1", "miner-2", "miner-3"})


def hindered(needed: int = 2) -> Hindered:
    return Hindered("r", [Group(frozenset({"committer"}), 1), Group(MINERS, needed)], moved=0.0)


def wait(service: str, *, given_up: bool = True, error: str = "RuntimeError: other\ndtype") -> Wait:
    return Wait(service, "r/3/train", "r", "repair" if given_up else "memory", error, given_up)


def test_a_run_is_left_when_too_few_miners_are_left_that_try() -> None:
    watched, found = hindered(), [wait("miner-1"), wait("miner-2")]
    assert watched.verdict(found, 100.0, "logs") is None
    assert watched.verdict(found, 100.0 + GIVEN_UP_SECONDS - 0.1, "logs") is None
    error = watched.verdict(found, 100.0 + GIVEN_UP_SECONDS, "logs")
    assert isinstance(error, Fatal)
    assert "run r cannot go on: miner-1 has given up (3/train): RuntimeError: other dtype; miner-2" in str(error)
    assert "\n" not in str(error)


def test_enough_miners_that_try_are_enough() -> None:
    watched = hindered(needed=1)
    for now in (0.0, 1e6):
        assert watched.verdict([wait("miner-1"), wait("miner-2")], now, "logs") is None


def test_one_service_that_gave_up_is_enough_to_leave() -> None:
    watched = hindered()
    watched.verdict([wait("committer")], 0.0, "logs")
    assert isinstance(watched.verdict([wait("committer")], GIVEN_UP_SECONDS, "logs"), Fatal)


def test_who_recovers_in_between_counts_anew() -> None:
    watched, found = hindered(), [wait("miner-1"), wait("miner-2")]
    watched.verdict(found, 0.0, "logs")
    watched.verdict([], 5.0, "logs")
    assert watched.verdict(found, GIVEN_UP_SECONDS, "logs") is None


def test_what_may_pass_is_waited_for_longer_and_while_anything_happens() -> None:
    watched, found = hindered(), [wait(name, given_up=False, error="out of memory") for name in sorted(MINERS)]
    watched.verdict(found, 0.0, "logs")
    assert watched.verdict(found, HINDERED_SECONDS - 1, "logs") is None
    watched.moved = 100.0
    assert watched.verdict(found, HINDERED_SECONDS, "logs") is None
    error = watched.verdict(found, HINDERED_SECONDS + 100.0, "logs")
    assert isinstance(error, Retry)
    assert "waits for memory (3/train): out of memory" in str(error)


def test_a_short_try_in_between_is_no_recovery() -> None:
    """An action that is left alone for minutes, and ends its process as soon as it is tried."""
    watched, found = hindered(), [wait(name, given_up=False) for name in sorted(MINERS)]
    watched.verdict(found, 0.0, "logs")
    for now in (299.0, 301.0):
        assert watched.verdict([], now, "logs") is None
    assert watched.verdict(found, HINDERED_SECONDS - 1, "logs") is None
    assert isinstance(watched.verdict(found, HINDERED_SECONDS, "logs"), Retry)
    for now in (601.0, 700.0):
        assert watched.verdict([], now, "logs") is None
    assert watched.verdict(found, 701.0, "logs") is None


def test_a_process_that_answers_now_and_then_is_slow_and_not_stopped() -> None:
    watched, silent = hindered(), [Wait("committer", "answering", "", PROCESS, "no answer", given_up=False)]
    for now in range(0, 3000, 30):
        assert watched.verdict(silent if now % 60 else [], float(now), "logs") is None
    assert watched.verdict(silent, 3000.0, "logs") is None
    assert isinstance(watched.verdict(silent, 2970.0 + HINDERED_SECONDS, "logs"), Retry)


def test_waits_are_shown_when_they_last_and_what_was_given_up_at_once() -> None:
    watched, passing, lasting = hindered(), wait("miner-1", given_up=False), wait("miner-2")
    assert watched.lines([passing, lasting]) == ["miner-2 has given up (3/train): RuntimeError: other dtype"]
    assert len(watched.lines([passing, lasting])) == 2
    assert watched.lines([]) == []


def test_one_broker_that_is_away_is_one_line_for_a_service() -> None:
    watched = Hindered("r", [])
    found = [
        Wait(name, f"reading {stream}", "", "broker", f"{stream} is away", given_up=False)
        for name in ("a", "b")
        for stream in "CAB"
    ]
    assert watched.lines(found) == []
    assert watched.lines(found) == [
        "a waits for broker (reading A): A is away",
        "b waits for broker (reading A): A is away",
    ]


def test_a_line_is_printed_once_while_it_is_true() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    for lines in (["a"], ["a", "b"], ["b"], ["a", "b"]):
        display.hindrances(lines)
    assert [line.rpartition(" ")[2] for line in stream.getvalue().splitlines()] == ["a", "b", "a"]
