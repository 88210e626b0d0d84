"""One fact, and a set of facts of one run by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, cast

from google.protobuf.message import Message
from typing_extensions import TypeVar as DefaultedTypeVar

from connito.wire.subjects import FactKey

# What is numbered by itself and not by cycles, and how many of them stay in memory.
RECEIPT, RECEIPTS_AT_HAND = "received", 4

M = TypeVar("M", bound=Message)
M_co = DefaultedTypeVar("M_co", bound=Message, covariant=True, default=Message)


class MissingFactError(LookupError):
    """A fact that has to be known by now is not: the caller asked too early."""


def message_of(fact: Fact[M] | None) -> M | None:
    """Return a fact's message; None for no fact."""
    return None if fact is None else fact.message


def require(message: M | None, run: str, what: str) -> M:
    """Return a message that has to be known by now. Raises `MissingFactError` naming it."""
    if message is None:
        raise MissingFactError(f"run {run} has no {what} yet")
    return message


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
class Fact(Generic[M_co]):
    """A verified message and where it stands in the log."""

    run: str
    key: FactKey
    message: M_co
    signer: str
    stream: str
    sequence: int
    time_unix_ms: int
    # SHA-256 of the stored bytes.
    digest: bytes = b""

    def of(self, message_type: type[M]) -> Fact[M] | None:
        """Return the fact if its message is of that type, else None."""
        return cast("Fact[M]", self) if isinstance(self.message, message_type) else None


class Shelf(Protocol):
    """Holds facts that are not in memory (`connito.wire.kept`)."""

    def all(self, run: str, section: str, cycle: int, kind: str) -> Mapping[str, Fact]: ...

    def put(self, fact: Fact) -> None: ...


@dataclass
class FactSet:
    """All facts of one run, by key. Insertion is idempotent and commutative: the first message on a subject stands.

    Verification has checked each payload's type against its key, so typed accessors do not check again. Those of cycles up to
    `shelved` are read from the `shelf` when they are asked for; of a run that is there as a `whole`, all are.
    """

    run: str
    facts: dict[FactKey, Fact] = field(default_factory=dict)
    _index: dict[tuple[str, int, str], dict[str, Fact]] = field(default_factory=dict)
    _sorted: dict[tuple[str, int, str], dict[str, Fact]] = field(default_factory=dict, compare=False)
    # Ids of facts of which one party may have several, `<party>-<number>`, by kind and party.
    _numbered: dict[tuple[str, int, str], dict[str, list[str]]] = field(default_factory=dict, compare=False)
    # The newest cycle whose train window, and that of every cycle before it, was opened; 0 before the first.
    cycle: int = 0
    shelf: Shelf | None = field(default=None, compare=False, repr=False)
    shelved: int = field(default=0, compare=False)
    # Receipts have numbers of their own, up to one a second: up to here they are on the shelf.
    receipts: int = field(default=0, compare=False)
    whole: bool = field(default=False, compare=False)

    def add(self, fact: Fact) -> bool:
        """Insert and return whether it was new. Of several ingress messages with one key, the smallest sequence stands."""
        known = self.fact(fact.key.section, fact.key.cycle, fact.key.kind, fact.key.id)
        if known is not None and known.sequence <= fact.sequence:
            return False
        if self.shelf is not None and self._is_shelved(fact.key.cycle, fact.key.kind):
            self.shelf.put(fact)
        else:
            self.facts[fact.key] = fact
            kind = (fact.key.section, fact.key.cycle, fact.key.kind)
            self._index.setdefault(kind, {})[fact.key.id] = fact
            self._sorted.pop(kind, None)
            owner, dash, _ = fact.key.id.rpartition("-")
            if dash and known is None:
                self._numbered.setdefault(kind, {}).setdefault(owner, []).append(fact.key.id)
        while self.fact("train", self.cycle + 1, "opened") is not None:
            self.cycle += 1
        return True

    def let_go(self, until: int, *, whole: bool = False) -> None:
        """Keep the cycles up to `until` and old receipts, or `whole` everything, on the shelf alone. It has them already."""
        # In this order: another thread that finds nothing here any more looks there.
        self.shelved, self.whole = max(self.shelved, until), self.whole or whole
        newest = max((number for _, number, kind in self._index if kind == RECEIPT), default=0)
        self.receipts = max(self.receipts, newest - RECEIPTS_AT_HAND)
        for place in [place for place in self._index if self._is_shelved(*place[1:])]:
            for id_ in self._index.pop(place):
                del self.facts[FactKey(*place, id_)]
            self._sorted.pop(place, None)
            self._numbered.pop(place, None)

    @property
    def last(self) -> int:
        """Return the newest cycle of which something is in memory; what is numbered by itself is none."""
        return max((number for _, number, kind in self._index if kind != RECEIPT), default=0)

    def _is_shelved(self, cycle: int, kind: str) -> bool:
        return self.whole or 0 < cycle <= (self.receipts if kind == RECEIPT else self.shelved)

    def _from_shelf(self, section: str, cycle: int, kind: str) -> Mapping[str, Fact]:
        return self.shelf.all(self.run, section, cycle, kind) if self.shelf and self._is_shelved(cycle, kind) else {}

    def fact(self, section: str, cycle: int, kind: str, id_: str = "") -> Fact | None:
        """Return one fact of any kind, or None. Code that knows the kind uses the accessor of that kind."""
        here = self._index.get((section, cycle, kind))
        found = None if here is None else here.get(id_)
        return found or self._from_shelf(section, cycle, kind).get(id_)

    def all(self, section: str, cycle: int, kind: str) -> Mapping[str, Fact]:
        """Return the facts of any kind by id, as they are now. Code that knows the kind uses the accessor of that kind."""
        key = (section, cycle, kind)
        found = self._sorted.get(key)
        if found is None:
            here = self._index.get(key)
            if here is None:
                return self._from_shelf(section, cycle, kind)
            # In this order the next sort has only what came since to put in its place.
            found = self._sorted[key] = dict(sorted(here.items()))
            self._index[key] = dict(found)
        return found

    def numbered(self, section: str, cycle: int, kind: str, owner: str) -> list[Fact]:
        """Return the facts of a kind whose ids are a party's and a number, without a look at anybody else's."""
        place = (section, cycle, kind)
        if place in self._index:
            return [self._index[place][id_] for id_ in self._numbered.get(place, {}).get(owner, ())]
        return [fact for id_, fact in self._from_shelf(*place).items() if id_.rpartition("-")[0] == owner]

    def has(self, section: str, cycle: int, kind: str, id_: str = "") -> bool:
        """Return whether a fact of any kind is known."""
        return self.fact(section, cycle, kind, id_) is not None

    def one(self, of: type[M], section: str, cycle: int, kind: str, id_: str = "") -> Fact[M] | None:
        """Return one fact whose message has the type that verification checks for its kind."""
        return cast("Fact[M] | None", self.fact(section, cycle, kind, id_))

    def many(self, of: type[M], section: str, cycle: int, kind: str) -> Mapping[str, Fact[M]]:
        """Return facts by id whose messages have the type that verification checks for their kind."""
        return cast("Mapping[str, Fact[M]]", self.all(section, cycle, kind))
