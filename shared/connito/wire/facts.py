"""A run as the set of its facts: the one projection that every service decides on.

A fact is written once, to a subject of its own, and never changes; so a run's state is a set that only grows, the
order in which streams are read does not matter, and applying a fact twice is applying it once. What to do next is a
pure function of that set and the time (each service's `handlers.py`), evaluated whenever something arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from connito.errors import Invalid
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.wire.chain import Chains
from connito.wire.envelope import open_bytes
from connito.wire.roster import Roster
from connito.wire.subjects import WINDOWS, FactKey, parse_fact, parse_ingress

M = TypeVar("M", bound=Message)

# (section, kind) -> payload type, role that may sign it, field that must equal the subject's id ("" for no id).
CATALOGUE: dict[tuple[str, str], tuple[type[Message], str, str]] = {
    ("run", "created"): (run_pb2.RunCreated, "coordinator", ""),
    ("run", "miner"): (run_pb2.MinerEnrolled, "coordinator", "miner"),
    ("run", "validator"): (run_pb2.ValidatorJoined, "validator", "validator"),
    ("run", "invited"): (run_pb2.InviteUsed, "coordinator", "invite+number"),
    ("run", "ban"): (run_pb2.MinerBan, "coordinator", "miner+number"),
    ("run", "selected"): (run_pb2.SelectionMade, "selector", ""),
    ("run", "selection_failed"): (run_pb2.SelectionFailed, "selector", ""),
    ("run", "ended"): (run_pb2.RunEnded, "coordinator", ""),
    ("train", "seed"): (cycle_pb2.SeedCommitted, "validator", "validator"),
    ("commit", "accepted"): (cycle_pb2.CommitmentAccepted, "committer", "miner"),
    ("commit", "refused"): (cycle_pb2.Refused, "committer", "miner+ingress_sequence"),
    ("commit", "settled"): (cycle_pb2.WindowSettled, "committer", ""),
    ("submit", "accepted"): (cycle_pb2.RevealAccepted, "committer", "submission.miner"),
    ("submit", "refused"): (cycle_pb2.Refused, "committer", "miner+ingress_sequence"),
    ("submit", "settled"): (cycle_pb2.WindowSettled, "committer", ""),
    ("validate", "seed"): (cycle_pb2.SeedRevealed, "validator", "validator"),
    ("validate", "drawn"): (cycle_pb2.SeedDrawn, "coordinator", ""),
    ("validate", "report"): (cycle_pb2.ScoreReport, "validator", "validator"),
    ("merge", "scored"): (cycle_pb2.CycleScored, "aggregator", ""),
    ("merge", "version"): (cycle_pb2.VersionPublished, "aggregator", ""),
    ("library", "deposited"): (run_pb2.ExpertDeposited, "library", "expert_id"),
    ("library", "notice"): (run_pb2.ExpertNotice, "library", "id"),
    ("library", "used"): (run_pb2.ExpertUsed, "library", "id"),
    **{
        (window, "opened"): (cycle_pb2.WindowOpened, "coordinator", "")
        for window in ("train", "commit", "submit", "validate", "merge")
    },
    **{
        (window, "closed"): (cycle_pb2.WindowClosed, "coordinator", "")
        for window in ("train", "commit", "submit", "validate", "merge")
    },
}

# ingress kind -> payload type; the signer must be the miner of the subject.
INGRESS: dict[str, type[Message]] = {
    "trained": cycle_pb2.TrainingFinished,
    "commitment": cycle_pb2.Commitment,
    "reveal": cycle_pb2.Reveal,
}


@dataclass(frozen=True)
class Record:
    """A message as the broker stored it."""

    stream: str
    sequence: int
    subject: str
    data: bytes
    time_unix_ms: int
    headers: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Fact:
    """A verified message and where it stands in the log."""

    run: str
    key: FactKey
    message: Message
    signer: str
    stream: str
    sequence: int
    time_unix_ms: int


def _subject_id(message: Message, path: str) -> str:
    if "+" in path:
        return "-".join(str(getattr(message, name)) for name in path.split("+"))
    value: object = message
    for name in path.split("."):
        value = getattr(value, name)
    return str(value)


def verify_fact(record: Record, roster: Roster) -> Fact:
    """Check a stored fact: signature, role, type, and that payload and subject agree. Raises `Invalid` with the reason."""
    run, key = parse_fact(record.subject)
    entry = CATALOGUE.get((key.section, key.kind))
    if entry is None:
        raise Invalid(f"no fact is called {key.section}.{key.kind}", reason=reasons_pb2.REASON_UNKNOWN_TYPE)
    message_type, role, id_path = entry
    opened = open_bytes(record.data, record.subject)
    if not roster.permitted(role, opened.signer, record.time_unix_ms):
        raise Invalid(
            f"{opened.signer[:12]}… is not a {role} in the roster, and only a {role} may write {key.section}.{key.kind}",
            reason=reasons_pb2.REASON_NOT_PERMITTED,
        )
    message: Message = opened.read(message_type)
    claimed_run = message.spec.run if isinstance(message, run_pb2.RunCreated) else getattr(message, "run", "")
    if claimed_run != run or getattr(message, "cycle", key.cycle) != key.cycle:
        raise Invalid(f"the payload speaks of another run or cycle than its subject {record.subject}")
    if id_path and _subject_id(message, id_path) != key.id:
        raise Invalid(f"the payload speaks of another id than its subject {record.subject}")
    if role == "validator" and key.id != opened.signer:
        raise Invalid("a validator speaks for itself only", reason=reasons_pb2.REASON_NOT_PERMITTED)
    return Fact(run, key, message, opened.signer, record.stream, record.sequence, record.time_unix_ms)


def verify_ingress(record: Record) -> Fact:
    """Check what a miner said: signature, and that the signer is the miner of the subject. Raises `Invalid`."""
    run, miner, kind = parse_ingress(record.subject)
    if kind not in INGRESS:
        raise Invalid(
            f"miners say {', '.join(INGRESS)}; {kind!r} is none of them", reason=reasons_pb2.REASON_UNKNOWN_TYPE
        )
    opened = open_bytes(record.data, record.subject)
    if opened.signer != miner:
        raise Invalid("signed by another key than the one in the subject", reason=reasons_pb2.REASON_NOT_PERMITTED)
    message: Message = opened.read(INGRESS[kind])
    if getattr(message, "run", "") != run:
        raise Invalid(f"the payload speaks of another run than its subject {record.subject}")
    key = FactKey("ingress", int(getattr(message, "cycle", 0)), kind, miner)
    return Fact(run, key, message, opened.signer, record.stream, record.sequence, record.time_unix_ms)


@dataclass
class RunFacts:
    """All facts of one run, by key. Insertion is idempotent and commutative: the first message on a subject stands."""

    run: str
    facts: dict[FactKey, Fact] = field(default_factory=dict)
    _index: dict[tuple[str, int, str], dict[str, Fact]] = field(default_factory=dict)

    def add(self, fact: Fact) -> bool:
        """Insert; whether it was new. Of several ingress messages with one key, the smallest sequence stands."""
        known = self.facts.get(fact.key)
        if known is not None and known.sequence <= fact.sequence:
            return False
        self.facts[fact.key] = fact
        self._index.setdefault((fact.key.section, fact.key.cycle, fact.key.kind), {})[fact.key.id] = fact
        return True

    def get(self, message_type: type[M], section: str, cycle: int, kind: str, id_: str = "") -> M | None:
        """The payload of one fact, or None."""
        fact = self.facts.get(FactKey(section, cycle, kind, id_))
        if fact is None:
            return None
        assert isinstance(fact.message, message_type)
        return fact.message

    def has(self, section: str, cycle: int, kind: str, id_: str = "") -> bool:
        """Whether the fact is known."""
        return FactKey(section, cycle, kind, id_) in self.facts

    def fact(self, section: str, cycle: int, kind: str, id_: str = "") -> Fact | None:
        """One fact with its place in the log, or None."""
        return self.facts.get(FactKey(section, cycle, kind, id_))

    def all(self, section: str, cycle: int, kind: str) -> dict[str, Fact]:
        """Facts of a kind by id, in the order of ids."""
        return dict(sorted(self._index.get((section, cycle, kind), {}).items()))

    @property
    def spec(self) -> run_pb2.RunSpec | None:
        """What was asked for."""
        created = self.get(run_pb2.RunCreated, "run", 0, "created")
        return None if created is None else created.spec

    @property
    def selection(self) -> run_pb2.SelectionMade | None:
        """The target experts."""
        return self.get(run_pb2.SelectionMade, "run", 0, "selected")

    @property
    def ended(self) -> run_pb2.RunEnded | None:
        """How the run ended, once it has."""
        return self.get(run_pb2.RunEnded, "run", 0, "ended")

    @property
    def miners(self) -> list[str]:
        """Enrolled miners, sorted."""
        return list(self.all("run", 0, "miner"))

    @property
    def validators(self) -> list[str]:
        """Validators that joined, sorted."""
        return list(self.all("run", 0, "validator"))

    def opened(self, window: str, cycle: int) -> cycle_pb2.WindowOpened | None:
        """The opening of a window."""
        return self.get(cycle_pb2.WindowOpened, window, cycle, "opened")

    def closed(self, window: str, cycle: int) -> cycle_pb2.WindowClosed | None:
        """The close of a window."""
        return self.get(cycle_pb2.WindowClosed, window, cycle, "closed")

    def settled(self, window: str, cycle: int) -> cycle_pb2.WindowSettled | None:
        """What the committer found inside a closed window (commit, submit)."""
        return self.get(cycle_pb2.WindowSettled, window, cycle, "settled")

    def version(self, cycle: int) -> cycle_pb2.VersionPublished | None:
        """The model version that a cycle produced."""
        return self.get(cycle_pb2.VersionPublished, "merge", cycle, "version")

    def cycles(self) -> Iterator[int]:
        """Numbers of the cycles whose train window was opened, from 1."""
        cycle = 1
        while self.opened("train", cycle) is not None:
            yield cycle
            cycle += 1

    @property
    def cycle(self) -> int:
        """The current cycle; 0 before the first."""
        return max(self.cycles(), default=0)

    def inside(self, window: str, cycle: int, fact: Fact) -> bool:
        """Whether a fact lies inside a window: not closed yet, or its sequence is at most the last one."""
        closed = self.closed(window, cycle)
        return closed is None or (fact.stream == closed.stream and fact.sequence <= closed.last_sequence)


class Log:
    """Facts of every run seen, filled from records. Invalid records are reported through `rejected`, never applied."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.runs: dict[str, RunFacts] = {}
        self.chains: dict[str, Chains] = {}

    def apply(self, record: Record) -> Fact | None:
        """Verify and insert. Returns the fact if it was new, None if known. Raises `Invalid` if it does not verify."""
        if ".ingress." not in record.subject:
            run = record.subject.split(".")[2:3]
            self.chains.setdefault("".join(run), Chains()).extend(record.subject, record.sequence, record.data)
        fact = verify_ingress(record) if ".ingress." in record.subject else verify_fact(record, self.roster)
        facts = self.runs.setdefault(fact.run, RunFacts(fact.run))
        return fact if facts.add(fact) else None


def before(facts: RunFacts, cycle: int) -> cycle_pb2.CycleScored:
    """The result of the cycle before, empty before the first one."""
    return facts.get(cycle_pb2.CycleScored, "merge", cycle - 1, "scored") or cycle_pb2.CycleScored()


def open_window(facts: RunFacts) -> tuple[str, int] | None:
    """The window that is open, and its cycle."""
    cycle = facts.cycle
    for window in reversed(WINDOWS):
        if facts.opened(window, cycle) is not None:
            return None if facts.closed(window, cycle) is not None else (window, cycle)
    return None
