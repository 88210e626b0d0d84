"""View one window of one cycle: its opening, its close, and what lies inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.fact import Fact, FactSet, message_of, require


@dataclass(frozen=True)
class Window:
    """One window of one cycle, as far as its facts are known."""

    facts: FactSet
    name: str
    cycle: int

    @property
    def opened_fact(self) -> Fact[cycle_pb2.WindowOpened] | None:
        """Return the opening as it was written."""
        return self.facts.one(cycle_pb2.WindowOpened, self.name, self.cycle, "opened")

    @property
    def opened(self) -> cycle_pb2.WindowOpened | None:
        """Return the opening."""
        return message_of(self.opened_fact)

    @property
    def closed_fact(self) -> Fact[cycle_pb2.WindowClosed] | None:
        """Return the close as it was written."""
        return self.facts.one(cycle_pb2.WindowClosed, self.name, self.cycle, "closed")

    @property
    def closed(self) -> cycle_pb2.WindowClosed | None:
        """Return the close."""
        return message_of(self.closed_fact)

    @property
    def is_open(self) -> bool:
        """Return whether it is opened and not closed."""
        return self.opened_fact is not None and self.closed_fact is None

    @property
    def settled(self) -> cycle_pb2.WindowSettled | None:
        """Return what the committer found inside once it was closed (commit, submit)."""
        return message_of(self.facts.one(cycle_pb2.WindowSettled, self.name, self.cycle, "settled"))

    @property
    def submissions(self) -> list[cycle_pb2.Submission]:
        """Return what was settled as submitted, one for each miner; nothing before (submit)."""
        return [] if self.settled is None else list({entry.miner: entry for entry in self.settled.submissions}.values())

    @property
    def accepted(self) -> Mapping[str, Fact]:
        """Return accepted messages by miner (commit, submit)."""
        return self.facts.all(self.name, self.cycle, "accepted")

    @property
    def refused(self) -> Mapping[str, Fact[cycle_pb2.Refused]]:
        """Return refused messages by miner and ingress sequence (commit, submit)."""
        return self.facts.many(cycle_pb2.Refused, self.name, self.cycle, "refused")

    @property
    def drawn_fact(self) -> Fact[cycle_pb2.SeedDrawn] | None:
        """Return the draw of its cycle's seed as it was written (validate)."""
        return self.facts.one(cycle_pb2.SeedDrawn, self.name, self.cycle, "drawn")

    @property
    def deadline_unix_ms(self) -> int:
        """Return the time at which it is closed at the latest; 0 for one that has no deadline or is not opened."""
        return 0 if self.opened is None else self.opened.deadline_unix_ms

    @property
    def expected(self) -> list[str]:
        """Return who was named when it opened; nobody before."""
        return [] if self.opened is None else list(self.opened.expected)

    @property
    def before(self) -> list[Window]:
        """Return the windows of the same name in the cycles before, the first cycle first."""
        return [Window(self.facts, self.name, cycle) for cycle in range(1, self.cycle)]

    @property
    def start(self) -> tuple[int, ArtifactRef]:
        """Return the model version that its cycle starts from, and the target-expert state θ_t of that version."""
        before = self.facts.one(cycle_pb2.VersionPublished, "merge", self.cycle - 1, "version")
        start = message_of(before) or Window(self.facts, "train", self.cycle).opened
        if start is not None:
            return start.version, start.state
        assert self.cycle == 1, "a cycle after the first opens when the one before has published its version"
        selected = message_of(self.facts.one(run_pb2.SelectionMade, "run", 0, "selected"))
        return 0, require(selected, self.facts.run, "selection").initial_state

    def refusal(self, miner: str, ingress_sequence: int) -> cycle_pb2.Refused | None:
        """Return why a message of a miner was refused (commit, submit); None for one that was not."""
        id_ = f"{miner}-{ingress_sequence}"
        return message_of(self.facts.one(cycle_pb2.Refused, self.name, self.cycle, "refused", id_))

    def refusals(self, miner: str) -> list[cycle_pb2.Refused]:
        """Return why messages of a miner were refused (commit, submit)."""
        found = self.facts.numbered(self.name, self.cycle, "refused", miner)
        return [fact.message for fact in found if isinstance(fact.message, cycle_pb2.Refused)]

    def inside(self, fact: Fact) -> bool:
        """Return whether a fact lies inside: not closed yet, or its sequence is at most the last one."""
        closed = self.closed
        return closed is None or (fact.stream == closed.stream and fact.sequence <= closed.last_sequence)

    def require_opened(self) -> cycle_pb2.WindowOpened:
        """Return the opening. Raises `MissingFactError` before it."""
        return require(self.opened, self.facts.run, f"opening of {self.name} in cycle {self.cycle}")

    def require_closed(self) -> cycle_pb2.WindowClosed:
        """Return the close. Raises `MissingFactError` before it."""
        return require(self.closed, self.facts.run, f"close of {self.name} in cycle {self.cycle}")

    def require_settled(self) -> cycle_pb2.WindowSettled:
        """Return what was inside. Raises `MissingFactError` before the committer has settled it."""
        return require(self.settled, self.facts.run, f"settlement of {self.name} in cycle {self.cycle}")
