"""Expected participants: those that a window names when it opens, and those of them who have not acted yet."""

from __future__ import annotations

from connito.protocol.bans import banned
from connito.protocol.beacon import opens
from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import RunSpec
from connito.wire.facts import RunFacts


def _named(facts: RunFacts, cycle: int) -> set[str]:
    opened = facts.window("train", cycle).opened
    return set() if opened is None else set(opened.expected)


def _known_before(facts: RunFacts, cycle: int) -> set[str]:
    return set().union(*(_named(facts, earlier) for earlier in range(1, cycle)))


def active(facts: RunFacts) -> set[str]:
    """Return the enrolled miners without a known ban; windows do not wait for others."""
    return set(facts.miners) - set(banned(facts))


def expected_miners(facts: RunFacts, cycle: int) -> list[str]:
    """Return miners that cycle `cycle` waits for: new ones, and those that committed in the cycle before.

    "New" means that no earlier cycle has named them, which needs no comparison of times between streams. When that
    leaves nobody, everyone enrolled is given another chance.
    """
    settled = facts.window("commit", cycle - 1).settled
    committed = set() if settled is None else set(settled.committed)
    enrolled = active(facts)
    current = (enrolled - _known_before(facts, cycle)) | (enrolled & committed)
    return sorted(current or enrolled)


def expected_validators(facts: RunFacts, spec: RunSpec, cycle: int) -> list[str]:
    """Return validators that cycle `cycle` waits for: new ones, and those that reported in the cycle before.

    When these are no quorum, everyone who joined: without the others there would be nothing to score with.
    """
    joined = set(facts.validators)
    reported = joined & set(facts.reports(cycle - 1))
    current = (joined - _known_before(facts, cycle)) | reported
    return sorted(current if len(current) >= spec.windows.min_validators else joined)


def seeded(facts: RunFacts, cycle: int) -> list[str]:
    """Return validators whose seed commitment is known. The list in `validate.opened` is final: nobody joins a draw
    later.
    """
    return list(facts.seed_commitments(cycle))


def trained(facts: RunFacts, cycle: int) -> list[str]:
    """Return enrolled miners that said they are done."""
    enrolled = active(facts)
    return [miner for miner in facts.trained(cycle) if miner in enrolled]


def committed(facts: RunFacts, cycle: int) -> list[str]:
    """Return miners whose commitment stands."""
    settled = facts.window("commit", cycle).settled
    return [] if settled is None else sorted(settled.committed)


def idle_in_train(facts: RunFacts, cycle: int) -> list[str]:
    """Return expected miners that have not trained and expected validators that have not committed a seed.

    Somebody who was named by another leader and whose enrolment was not read yet counts as idle.
    """
    opened = facts.window("train", cycle).opened
    assert opened is not None
    miners, validators, out = set(facts.miners), set(facts.validators), set(banned(facts))
    return [
        key
        for key in opened.expected
        if (key not in miners | validators and key not in out)
        or (key in miners - out and key not in facts.trained(cycle))
        or (key in validators and key not in facts.seed_commitments(cycle))
    ]


def unanswered(facts: RunFacts, window: str, cycle: int) -> list[str]:
    """Return the miners without an accepted or refused message in a commit or submit window, of those named when it opened
    and those who, in the case of commit, trained since."""
    opened = facts.window(window, cycle).opened
    assert opened is not None
    people = {*opened.expected, *(trained(facts, cycle) if window == "commit" else committed(facts, cycle))}
    refused = {
        fact.message.miner
        for fact in facts.window(window, cycle).refused.values()
        if isinstance(fact.message, cycle_pb2.Refused)
    }
    out = set(banned(facts))
    return [miner for miner in sorted(people - refused - out) if miner not in facts.window(window, cycle).accepted]


def silent(facts: RunFacts, cycle: int, validators: list[str]) -> list[str]:
    """Return those of `validators` whose secret, or the commitment to judge it by, is not known yet."""
    return [
        key for key in validators if key not in facts.seed_reveals(cycle) or key not in facts.seed_commitments(cycle)
    ]


def secrets(facts: RunFacts, cycle: int, validators: list[str]) -> dict[str, bytes]:
    """Return revealed secrets of `validators` that match what each committed to during train."""
    valid: dict[str, bytes] = {}
    for validator in validators:
        commitment = facts.seed_commitment(cycle, validator)
        reveal = facts.seed_reveal(cycle, validator)
        if commitment is None or reveal is None:
            continue
        if opens(commitment.digest, facts.run, cycle, validator, reveal.secret):
            valid[validator] = reveal.secret
    return valid
