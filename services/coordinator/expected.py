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


def waiting(facts: RunFacts, window: Window) -> bool:
    """Return whether an open window other than validate still waits for anybody's message. Asked with every message that comes:
    it looks no further than the first who owes one.
    """
    if window.name == "train":
        return _someone_idle(facts, window)
    if window.name == "merge":
        return facts.version(window.cycle) is None
    return _someone_unanswered(facts, window)


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


def _someone_idle(facts: RunFacts, window: Window) -> bool:
    """Return whether a named miner has not trained or a named validator has not committed a seed.

    Somebody who was named by another leader and whose enrolment was not read yet counts as idle.
    """
    cycle, out = window.cycle, set(banned(facts))

    def idle(key: str) -> bool:
        trains, judges = facts.is_enrolled(key) and key not in out, facts.has("run", 0, "validator", key)
        if not trains and not judges:
            return key not in out
        trained = not trains or facts.has("ingress", cycle, "trained", key)
        return not trained or (judges and facts.seed_commitment(cycle, key) is None)

    return any(idle(key) for key in window.require_opened().expected)


def _someone_unanswered(facts: RunFacts, window: Window) -> bool:
    """Return whether a miner has neither an accepted nor a refused message, of those named when a commit or submit window opened
    and those who, in the case of commit, trained since."""
    name, cycle, out = window.name, window.cycle, set(banned(facts))

    def owes(miner: str) -> bool:
        answered = facts.has(name, cycle, "accepted", miner) or window.refusals(miner)
        return not answered and miner not in out

    if any(owes(miner) for miner in window.require_opened().expected):
        return True
    since = _trained(facts, window) if name == "commit" else _committed(facts.window("commit", cycle))
    return any(owes(miner) for miner in since)
