"""Quota of answered messages per key. It is computed from the log, so that an auditor can count them again.

A refusal is a fact, and facts are for ever: without a bound, one key that floods its own subject would write as many
of them as it likes, and everybody's answers would wait behind them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

from connito.v1.run_pb2 import RunSpec
from connito.wire.fact import Fact

# More than any policy allows (`enrolment.messages_per_cycle`): later ones are not told apart.
COUNTED = 100_001
# So many of a key's messages to one run that do not verify are kept as dead letters; what follows is dropped.
LETTERS_PER_KEY = 16


@dataclass
class MessageCounter:
    """Sequences of a run's commitments and reveals, by kind and miner, by cycle. Cycles that the run does not have are one."""

    _sequences: defaultdict[tuple[str, str], dict[int, list[int]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, fact: Fact) -> None:
        """Note a message. They come in the order of INGRESS; one that comes again is not counted twice."""
        known = self._sequences[fact.key.kind, fact.signer].setdefault(fact.key.cycle, [])
        if len(known) < COUNTED and (not known or known[-1] < fact.sequence):
            known.append(fact.sequence)

    def before(self, fact: Fact, spec: RunSpec) -> int:
        """Return how many messages of the same kind, miner and cycle were said before this one."""
        known = self._sequences.get((fact.key.kind, fact.signer), {})
        own = 1 <= fact.key.cycle <= spec.cycles
        cycles = [fact.key.cycle] if own else [cycle for cycle in known if not 1 <= cycle <= spec.cycles]
        return sum(bisect_left(known.get(cycle, []), fact.sequence) for cycle in cycles)

    def over(self, fact: Fact, spec: RunSpec) -> bool:
        """Return whether a message is beyond what the run's policy answers one by one."""
        limit = spec.enrolment.messages_per_cycle
        return limit > 0 and self.before(fact, spec) >= limit
