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
    known = _known(facts, train, enrolled | joined)
    committed = set() if settled is None else set(settled.committed)
    miners = (enrolled - known) | (enrolled & committed)
    validators = (joined - known) | (joined & set(reports))
    return (miners or enrolled) | (validators if quorum_of_draw(facts, train.cycle, validators, stake) else joined)


def _known(facts: RunFacts, train: Window, keys: set[str]) -> set[str]:
    """Return those of `keys` whom an earlier cycle has named: most of them the one before.

    Heads tell it without a look at old cycles, as they stand in the stream of who came: whoever stood before a cycle's head was
    named by then, unless banned, and nobody was named in a cycle who came behind the head of the next one.
    """
    came = {key: fact.sequence for key, fact in facts.joined.items()}
    came |= {key: min(fact.sequence, came.get(key, fact.sequence)) for key, fact in facts.enrolled.items()}
    last, banned_once = facts.head(train.cycle - 1), {fact.message.miner for fact in facts.bans.values()}
    known = {key for key in keys - banned_once if last is not None and came[key] < last.sequence}
    for cycle in range(train.cycle - 1, 0, -1):
        head = facts.head(cycle + 1)
        if all(head is not None and came[key] > head.sequence for key in keys - known):
            break
        known |= keys & set(facts.window("train", cycle).expected)
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
