"""Differences between a record and what follows from its inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from google.protobuf.message import Message

from connito.render import formats

MAX_TEXT = 160
# Fields that people read and that decide nothing: they are never compared.
_WORDS = ("detail", "gate_detail", "text", "refused")


OPERATOR, NOBODY = "operator", "nobody"
_OF_A_VALIDATOR = re.compile(r"validate\.\d+\.(?:report|objection)\.(U[A-Z2-7]{55})\b")


@dataclass(frozen=True)
class Difference:
    """One divergence. `where` is a subject of the log or an artifact, `what` says what was expected and what is there.

    `miner` is the submission it concerns, empty when it concerns everybody. `by` is who is to blame: `operator`, a validator
    or a miner by its key, `nobody`. Only what somebody signed is held against a participant; what else is wrong with a log
    lies with the operator, who keeps it and whose services answer for it.
    """

    check: str
    where: str
    what: str
    cycle: int = 0
    miner: str = ""
    by: str = ""

    def __post_init__(self) -> None:
        if not self.by:
            own = _OF_A_VALIDATOR.match(self.where)
            object.__setattr__(self, "by", OPERATOR if own is None else f"validator {own[1]}")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that the commands print."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.what}"


@dataclass(frozen=True)
class Step:
    """One check of one cycle (0: of the run): how many things were compared, and what differs. `note` qualifies it."""

    check: str
    cycle: int
    compared: int
    differences: tuple[Difference, ...] = ()
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `connito audit --json` prints."""
        return {**vars(self), "differences": len(self.differences)}


def first_difference(expected: Message, found: Message, skip: Container[str] = ()) -> str:
    """Return the first field, in the order of their numbers, in which two messages of one type differ, and how; empty
    when they are equal to the bit. Sentences, and fields named in `skip`, are not looked at, at any depth.
    """
    return next(differing(expected, found, skip), "")


def differing(expected: Message, found: Message, skip: Container[str] = (), path: str = "") -> Iterator[str]:
    """Yield every field in which two messages differ, as `path: … recomputed, … in the log`."""
    for descriptor in expected.DESCRIPTOR.fields:
        if descriptor.name in skip or descriptor.name in _WORDS:
            continue
        here = f"{path}{descriptor.name}"
        one, other = getattr(expected, descriptor.name), getattr(found, descriptor.name)
        if not descriptor.is_repeated:
            yield from _values(one, other, skip, here)
            continue
        if len(one) != len(other):
            yield f"{here}: {formats.count(len(one), 'entry')} recomputed, {len(other)} in the log"
        for index, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from _values(left, right, skip, f"{here}[{index}]")


def _values(one: Any, other: Any, skip: Container[str], here: str) -> Iterator[str]:
    if isinstance(one, Message):
        yield from differing(one, other, skip, f"{here}.")
    elif one != other and not (isinstance(one, float) and math.isnan(one) and math.isnan(other)):
        yield f"{here}: {_text(one)} recomputed, {_text(other)} in the log"


def _text(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
