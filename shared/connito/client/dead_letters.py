"""Dead letters: messages that could not be handled, why, and handing them back. For an operator's session."""

from __future__ import annotations

from dataclasses import dataclass

from connito.errors import Invalid, NotFound
from connito.platform.session import Session
from connito.runtime.tasks import blocking
from connito.v1.cycle_pb2 import DeadLetter
from connito.wire.enums import reason_name
from connito.wire.envelope import open_bytes
from connito.wire.fact import Record


@dataclass(frozen=True)
class Letter:
    """A dead letter under its number in the DLQ stream."""

    number: int
    letter: DeadLetter

    def to_json(self) -> dict[str, object]:
        """Return what `connito dlq ls --json` prints for it."""
        letter = self.letter
        return {
            "number": self.number, "service": letter.service, "stream": letter.stream, "sequence": letter.sequence,
            "subject": letter.subject, "reason": reason_name(letter.reason), "detail": letter.detail,
        }  # fmt: skip

    def message(self) -> str:
        """Return what can be read of the message."""
        try:
            opened = open_bytes(self.letter.body, self.letter.subject)
        except Invalid as error:
            return f"not readable: {error}"
        return f"{opened.type_name} by {opened.signer}, {len(opened.payload)} bytes"


def ls(session: Session) -> list[Letter]:
    """Return the dead letters, oldest first."""

    async def read() -> list[Record]:
        async with session.bus() as bus:
            return [record async for record in bus.stored(["DLQ"])]

    stored = blocking(read())
    return [Letter(record.sequence, open_bytes(record.data, record.subject).read(DeadLetter)) for record in stored]


def show(session: Session, number: int) -> Letter:
    """Return one dead letter. Raises `NotFound`."""
    for found in ls(session):
        if found.number == number:
            return found
    raise NotFound(f"there is no dead letter {number}; `connito dlq ls` lists them")


def retry(session: Session, number: int) -> Letter:
    """Hand a message back to the service that could not handle it, under its original signature. Raises `NotFound`, and
    `Invalid` when the broker does not take it."""
    found = show(session, number)
    blocking(_publish(session, found.letter))
    return found


async def _publish(session: Session, letter: DeadLetter) -> None:
    from nats.js.errors import APIError

    async with session.bus() as bus:
        try:
            # A fact's subject admits one message, and this one stands there: only a new sequence makes it delivered
            # again, and readers keep the first of two equal facts.
            await bus.js.publish(letter.subject, letter.body)
        except APIError as error:
            raise Invalid(f"the broker does not take {letter.subject} back: {error.description}") from error
