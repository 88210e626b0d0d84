"""Learn deadlines from what earlier cycles of the same run took, with some slack."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import WindowPolicy
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.window import Window

# Facts whose arrival is somebody acting in a window.
_ACTS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (("ingress", "trained"), ("train", "seed")),
    "commit": (("commit", "accepted"), ("commit", "refused")),
    "submit": (("submit", "accepted"), ("submit", "refused")),
    "validate": (("validate", "report"),),
    "merge": (("merge", "version"),),
}
_SLACK = 6.0
# Cycles whose windows say how long people take.
_LATELY = 64


def window_ms(facts: RunFacts, window: Window) -> int | None:
    """Return what a closed window took, in milliseconds of the broker's clock; None while it is not closed.

    A window that ran into its deadline is measured to the last act inside it. Its own length says only how long one
    absentee was waited for, and would teach the ceiling to every later cycle.
    """
    opened, closed = window.opened_fact, window.closed_fact
    if opened is None or closed is None:
        return None
    end = closed.time_unix_ms
    if window.name == "train" and window.deadline_unix_ms:
        # How long a run was paused says nothing about how long people take.
        end = min(end, window.deadline_unix_ms)
    if closed.message.cause == cycle_pb2.CLOSE_CAUSE_DEADLINE:
        end = max((fact.time_unix_ms for fact in _acts(facts, window) if fact.time_unix_ms <= end), default=end)
    return max(0, end - opened.time_unix_ms)


def _acts(facts: RunFacts, window: Window) -> Iterator[Fact]:
    for section, kind in _ACTS[window.name]:
        yield from facts.all(section, window.cycle, kind).values()


def learned_ms(history_ms: list[int], policy: WindowPolicy) -> int:
    """Return `median + 6·MAD` of earlier cycles between the policy's floor and ceiling; the ceiling when there are none.

    The MAD of two or three cycles is often next to zero, so it is taken as at least a sixth of the median: a deadline
    never falls below twice what the window usually takes.
    """
    floor, ceiling = round(policy.floor_seconds * 1000), round(policy.ceiling_seconds * 1000)
    if not history_ms:
        return ceiling
    middle = median(history_ms)
    spread = max(median(abs(value - middle) for value in history_ms), middle / _SLACK)
    return min(ceiling, max(floor, round(middle + _SLACK * spread)))


def deadline_ms(facts: RunFacts, window: Window, now_ms: int, policy: WindowPolicy) -> int:
    """Return the time at which a window that opens now is closed at the latest (unix milliseconds)."""
    history = [window_ms(facts, earlier) for earlier in window.before[-_LATELY:]]
    return now_ms + learned_ms([value for value in history if value is not None], policy)
