"""Keep what miners said in a run, message by message: of several with one key, the facts of a run hold the first alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from connito.protocol.quota import COUNTED
from connito.v1.run_pb2 import RunSpec
from connito.wire.fact import Fact, FactSet
from connito.wire.subjects import FactKey


def counted(cycle: int, spec: RunSpec | None) -> int:
    """Return the cycle that a message counts in; those that the run does not have count as one, once its rules are known."""
    return cycle if spec is None or 1 <= cycle <= spec.cycles else 0


@dataclass
class Said(FactSet):
    """Commitments and reveals, of each miner, cycle and kind in the order of INGRESS. On the shelf as those of the run."""

    def hear(self, fact: Fact, spec: RunSpec | None) -> None:
        """Take in a message; one that comes again is the same one."""
        key = self.place(fact, spec)
        if len(self.all(key.section, key.cycle, key.kind)) < COUNTED:
            entry = replace(fact, run=self.run, key=key)
            if self.add(entry) and self.shelf is not None:
                self.shelf.put(entry)

    def place(self, fact: Fact, spec: RunSpec | None) -> FactKey:
        """Return where a message stands here."""
        return FactKey(fact.signer, counted(fact.key.cycle, spec), fact.key.kind, f"{fact.sequence:020}")

    def at(self, run: str, key: FactKey) -> Fact:
        """Return the message at a place as it was heard."""
        found = self.all(key.section, key.cycle, key.kind)[key.id]
        cycle = int(getattr(found.message, "cycle", 0))
        return replace(found, run=run, key=FactKey("ingress", cycle, key.kind, found.signer))

    def before(self, fact: Fact, spec: RunSpec | None) -> list[int]:
        """Return the sequences of the same miner's messages of that kind in that cycle, in front of this one."""
        key = self.place(fact, spec)
        return [int(id_) for id_ in self.all(key.section, key.cycle, key.kind) if id_ < key.id]

    def over(self, fact: Fact, spec: RunSpec) -> bool:
        """Return whether a message is beyond what the run's policy answers one by one (`connito.protocol.quota`)."""
        limit = spec.enrolment.messages_per_cycle
        return limit > 0 and len(self.before(fact, spec)) >= limit
