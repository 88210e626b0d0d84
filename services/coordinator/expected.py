"""Name the participants that a window waits for, and those of them that have not acted yet."""

from __future__ import annotations

from connito.protocol.bans import banned
from connito.protocol.rules import Stake, committed_in_time, quorum_of_draw
from connito.v1.cycle_pb2 import SeedDrawn
from connito.wire.facts import RunFacts
from connito.wire.window import Window


def active(facts: RunFacts) -> set[str]:
    """Return enrolled miners that are not banned, as far as is known. No window waits for the others."""
    return set(facts.miners) - set(banned(facts))


def named(facts: RunFacts, window: Window, stake: Stake) -> list[str]:
    """Return the participants to name when a window opens, sorted."""
    if window.name == "train":
        return sorted(_at_start(facts, window, stake))
    if window.name == "commit":
        return _trained(facts, window)
    if window.name == "submit":
        return _committed(facts.window("commit", window.cycle))
    # The list in `validate.opened` is final: nobody joins a draw later.
    return committed_in_time(facts, window.cycle) if window.name == "validate" else []


def waiting(facts: RunFacts, window: Window) -> list[str]:
    """Return the participants whose message an open window other than validate still waits for."""
    if window.name == "train":
        return _idle(facts, window)
    if window.name == "merge":
        return [] if facts.version(window.cycle) is not None else ["aggregator"]
    return _unanswered(facts, window)


def unreported(facts: RunFacts, drawn: SeedDrawn) -> list[str]:
    """Return the validators in a draw that have neither reported nor objected, as far as is known."""
    done = {*facts.reports(drawn.cycle), *facts.objections(drawn.cycle)}
    return [key for key in drawn.validators if key not in done]


def _at_start(facts: RunFacts, train: Window, stake: Stake) -> set[str]:
    """Return whom a cycle waits for: newcomers, miners that committed and validators that reported in the cycle before.

    A newcomer is one that no earlier cycle has named, which needs no comparison of times between streams. When that
    leaves no miner, everyone enrolled is given another chance; when it leaves no quorum of validators, everyone who
    joined, since without the others there would be nothing to score with.
    """
    enrolled, joined = active(facts), set(facts.validators)
    settled, reports = facts.window("commit", train.cycle - 1).settled, facts.reports(train.cycle - 1)
    known = _known(train, enrolled | joined)
    committed = set() if settled is None else set(settled.committed)
    miners = (enrolled - known) | (enrolled & committed)
    validators = (joined - known) | (joined & set(reports))
    return (miners or enrolled) | (validators if quorum_of_draw(facts, train.cycle, validators, stake) else joined)


def _known(train: Window, keys: set[str]) -> set[str]:
    """Return those of `keys` whom an earlier cycle has named: most of them the one before."""
    known: set[str] = set()
    for earlier in reversed(train.before):
        if keys <= known:
            break
        known |= keys & set(earlier.expected)
    return known


def _trained(facts: RunFacts, window: Window) -> list[str]:
    enrolled = active(facts)
    return [miner for miner in facts.trained(window.cycle) if miner in enrolled]


def _committed(commit: Window) -> list[str]:
    return [] if commit.settled is None else sorted(commit.settled.committed)


def _idle(facts: RunFacts, window: Window) -> list[str]:
    """Return named miners that have not trained and named validators that have not committed a seed.

    Somebody who was named by another leader and whose enrolment was not read yet counts as idle.
    """
    miners, validators, out = set(facts.miners), set(facts.validators), set(banned(facts))
    trained, seeded = facts.trained(window.cycle), facts.seed_commitments(window.cycle)
    return [
        key
        for key in window.expected
        if (key not in miners | validators and key not in out)
        or (key in miners - out and key not in trained)
        or (key in validators and key not in seeded)
    ]


def _unanswered(facts: RunFacts, window: Window) -> list[str]:
    """Return miners with neither an accepted nor a refused message, of those named when a commit or submit window
    opened and those who, in the case of commit, trained since."""
    since = _trained(facts, window) if window.name == "commit" else _committed(facts.window("commit", window.cycle))
    refused = {fact.message.miner for fact in window.refused.values()}
    owing = {*window.expected, *since} - refused - set(banned(facts))
    return [miner for miner in sorted(owing) if miner not in window.accepted]
