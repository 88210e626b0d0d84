"""The stored messages of a run, verified one by one: what every other check stands on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from connito.audit.differences import NOBODY, OPERATOR, Difference, Step
from connito.bus.streams import FACT_STREAMS, stream_of
from connito.errors import Invalid, NotFound
from connito.protocol.quota import LETTERS_PER_KEY
from connito.v1.cycle_pb2 import DeadLetter
from connito.wire.envelope import open_bytes
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.parts import Parts
from connito.wire.roster import ROLES, Roster
from connito.wire.subjects import DLQ_ROOT
from connito.wire.verification import verify_fact, verify_ingress

_NUMBER = re.compile(r"[0-9]{1,10}")
# Where a fact's place in the log is looked up: (stream, sequence).
Place = tuple[str, int]


@dataclass(frozen=True)
class Evidence:
    """A run as its log holds it. `said` are the miners' verified messages by their sequence in INGRESS."""

    run: str
    roster: Roster
    records: list[Record]
    facts: RunFacts
    said: dict[int, Fact]
    unreadable: list[tuple[Record, Invalid]] = field(default_factory=list)
    repeated: list[Record] = field(default_factory=list)
    letters: dict[Place, DeadLetter] = field(default_factory=dict)
    # Deposits of every run: what a run may have started from.
    library: list[Fact] = field(default_factory=list)
    parts: Parts = field(default_factory=Parts)
    # Facts that lay in parts, by subject: their envelopes as they were signed.
    joined: dict[str, bytes] = field(default_factory=dict)

    def name(self, key: str) -> str:
        """Return the label a miner enrolled with, or the start of its key."""
        return self.facts.label(key) or short_key(key)

    def subject(self, section: str, cycle: int, kind: str, id_: str = "") -> str:
        """Return a fact's subject without its common beginning, as people read it."""
        return f"{section}.{cycle}.{kind}" + (f".{id_}" if id_ else "")


@dataclass(frozen=True)
class Stored:
    """Messages as the broker stored them: of a run, dead letters of its messages, and the library's of every run."""

    records: list[Record]
    dead_letters: list[Record]
    library: list[Record]


def read_stored(run: str, stored: Stored, roster: Roster) -> Evidence:
    """Verify what was stored of a run. Raises as `read`."""
    letters = [letter for record in stored.dead_letters if (letter := _letter(record, roster))]
    return read(run, stored.records, roster, letters, stored.library)


def _letter(record: Record, roster: Roster) -> DeadLetter | None:
    """Return a dead letter that the service of its queue has signed; None for what anybody else put there."""
    try:
        opened = open_bytes(record.data, record.subject)
        letter = opened.read(DeadLetter)
    except Invalid:
        return None
    mine = roster.permits(letter.service, opened.signer)
    return letter if mine and record.subject == f"{DLQ_ROOT}.{letter.stream}.{letter.sequence}" else None


def read(
    run: str,
    records: Iterable[Record],
    roster: Roster,
    letters: Iterable[DeadLetter] = (),
    library: Iterable[Record] = (),
) -> Evidence:
    """Verify every record of a run. Raises `NotFound` when there is none.

    What does not verify is kept apart, never applied; a fact stands as it was first written.
    """
    ordered = sorted(records, key=lambda record: (record.stream, record.sequence))
    if not ordered:
        raise NotFound(f"the log has no run {run!r}; `connito job list` shows the runs")
    dead = {(letter.stream, letter.sequence): letter for letter in letters}
    evidence = Evidence(run, roster, ordered, RunFacts(run), {}, letters=dead)
    for record in ordered:
        try:
            _take(evidence, record)
        except Invalid as error:
            evidence.unreadable.append((record, error))
    for record in library:
        with suppress(Invalid):
            evidence.library.append(verify_fact(record, roster))
    return evidence


def _take(evidence: Evidence, record: Record) -> None:
    ingress = ".ingress." in record.subject
    whole = evidence.parts.take(record, evidence.roster)
    if whole is None:
        return
    if whole is not record:
        evidence.joined[record.subject] = whole.data
    fact = verify_ingress(record) if ingress else verify_fact(whole, evidence.roster)
    if fact.run != evidence.run or stream_of(record.subject) != record.stream:
        raise Invalid(f"{record.subject} lies in {record.stream}, where it does not belong")
    new = evidence.facts.add(fact)
    if ingress:
        evidence.said[record.sequence] = fact
    elif not new:
        evidence.repeated.append(record)


def signatures(evidence: Evidence, covers: Callable[[Record], bool] = lambda record: False) -> Step:
    """Check that every stored message is signed by a key with the right to it, for its subject, and published once.

    What a miner sent may be anything; it has to be among the dead letters then, with the same bytes. Of a key's messages
    that are none, so many are kept. `covers`: whether a head shows that a message lay there all along, so that it was not the
    operator who changed it later.
    """
    found = tuple(_unverified(evidence, covers))
    return Step("signatures", 0, len(evidence.records), found)


def _unverified(evidence: Evidence, covers: Callable[[Record], bool]) -> Iterator[Difference]:
    kept: Counter[str] = Counter()
    for record, error in evidence.unreadable:
        letter = evidence.letters.get((record.stream, record.sequence))
        owner = record.subject.split(".")[4:5] if record.stream not in FACT_STREAMS else []
        if letter is None and owner and kept[owner[0]] >= LETTERS_PER_KEY:
            continue
        kept.update(owner if letter is not None else ())
        if record.stream in FACT_STREAMS or letter is None or letter.body != record.data:
            by = _author(evidence, record) if covers(record) else OPERATOR
            yield Difference("signatures", _place(record), str(error), _cycle_of(record.subject), by=by)
    for record in evidence.repeated:
        yield Difference("signatures", _place(record), "a fact is written once, and this one stood already")


def _author(evidence: Evidence, record: Record) -> str:
    """Return whose signature is on a message that does not verify: nobody's, where none holds."""
    try:
        signer = open_bytes(record.data, record.subject).signer
    except Invalid:
        return NOBODY
    if evidence.roster.permits("validator", signer):
        return f"validator {signer}"
    return OPERATOR if any(evidence.roster.permits(role, signer) for role in ROLES) else NOBODY


def _place(record: Record) -> str:
    return f"{record.subject.split('.', 3)[-1]} ({record.stream} {record.sequence})"


def _cycle_of(subject: str) -> int:
    part = subject.split(".")[4:5]
    return int(part[0]) if part and _NUMBER.fullmatch(part[0]) else 0
