"""Assignment of submissions to validators by the cycle's seed, so unknown until it is drawn.

Submissions are dealt one after the other, each to the validators with least to do so far; among those, to the ones
that share the fewest submissions with the ones chosen already, so that any two validators soon have some in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from connito.wire.facts import RunFacts
from connito.wire.hashing import hash_fields

ASSIGN_TAG = b"connito.v1.assignment"


def assign(seed: bytes, miners: Iterable[str], validators: Iterable[str], each: int) -> dict[str, frozenset[str]]:
    """Return the miners whose submissions each validator scores.

    Every submission goes to min(`each`, n) different ones of the n validators, to all with `each` 0; the numbers of
    submissions of two validators differ by at most one. A pure function of the sets and the seed: the order in which
    people are named does not matter, and without the seed no assignment is likelier than another.
    """
    people, work = sorted(set(validators)), sorted(set(miners))
    if each <= 0 or each >= len(people):
        return {validator: frozenset(work) for validator in people}
    dealt: dict[str, set[str]] = {validator: set() for validator in people}
    shared: Counter[frozenset[str]] = Counter()
    for miner in sorted(work, key=lambda miner: hash_fields(ASSIGN_TAG, seed, miner, "")):
        lots = {validator: hash_fields(ASSIGN_TAG, seed, miner, validator) for validator in people}
        chosen: list[str] = []
        for _ in range(each):
            validator = min(
                (name for name in people if name not in chosen),
                key=lambda name: (
                    len(dealt[name]),
                    sum(shared[frozenset((name, other))] for other in chosen),
                    lots[name],
                ),
            )
            shared.update(frozenset((validator, other)) for other in chosen)
            chosen.append(validator)
            dealt[validator].add(miner)
    return {validator: frozenset(found) for validator, found in dealt.items()}


def assigned(facts: RunFacts, cycle: int) -> dict[str, frozenset[str]] | None:
    """Return the miners that each drawn validator scores in a cycle; None when all score all, or nothing is drawn."""
    spec, settled = facts.spec, facts.window("submit", cycle).settled
    drawn = facts.drawn(cycle)
    if spec is None or settled is None or drawn is None or not spec.scoring.validators_per_submission:
        return None
    miners = (entry.miner for entry in settled.submissions)
    return assign(drawn.seed, miners, drawn.validators, spec.scoring.validators_per_submission)
