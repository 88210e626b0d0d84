"""`connito dlq`: messages that could not be handled, why, and handing them back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.bus import Bus
    from connito.v1.cycle_pb2 import DeadLetter

app = typer.Typer(no_args_is_help=True, help="Messages that will not be handled, and why.")
Sequence = Annotated[int, typer.Argument(help="Number in the DLQ stream, as `dlq ls` shows it.")]


@app.command("ls")
def ls(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """List dead letters, oldest first."""
    letters = asyncio.run(_all(data_dir))
    rows = [_row(number, letter) for number, letter in letters]
    emit(
        as_json,
        {"letters": rows},
        lambda: table(
            ("number", "service", "stream", "sequence", "reason", "detail"),
            [(r["number"], r["service"], r["stream"], r["sequence"], r["reason"], r["detail"]) for r in rows],
            empty="no dead letters",
        ),
    )


@app.command("show")
def show(number: Sequence, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Show one dead letter with what can be read of the message."""
    letter = asyncio.run(_one(data_dir, number))
    document = {**_row(number, letter), "body_bytes": len(letter.body), "message": _read(letter)}
    emit(as_json, document, lambda: "\n".join(f"{key:<11} {value}" for key, value in document.items()))


@app.command("retry")
def retry(number: Sequence, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Hand a message back to the service that could not handle it. Its signature is the original one."""
    letter = asyncio.run(_retry(data_dir, number))
    emit(as_json, {"retried": number, "subject": letter.subject}, lambda: f"{letter.subject} was handed back")


async def _retry(data_dir: Any, number: int) -> DeadLetter:
    from nats.js.errors import APIError

    from connito.errors import Invalid
    from connito.platform.session import Session

    letter = await _one(data_dir, number)
    async with Session.open(data_dir, role="operator").bus() as bus:
        try:
            # A fact's subject admits one message, and this one stands there: only a new sequence makes it delivered
            # again, and readers keep the first of two equal facts.
            await bus.js.publish(letter.subject, letter.body)
        except APIError as error:
            raise Invalid(f"the broker does not take {letter.subject} back: {error.description}") from error
    return letter


async def _all(data_dir: Any) -> list[tuple[int, DeadLetter]]:
    from connito.platform.session import Session

    async with Session.open(data_dir, role="operator").bus() as bus:
        return await _letters(bus)


async def _one(data_dir: Any, number: int) -> DeadLetter:
    from connito.errors import NotFound

    for found, letter in await _all(data_dir):
        if found == number:
            return letter
    raise NotFound(f"there is no dead letter {number}; `connito dlq ls` lists them")


async def _letters(bus: Bus) -> list[tuple[int, DeadLetter]]:
    from connito.bus import CaughtUp
    from connito.v1.cycle_pb2 import DeadLetter
    from connito.wire.envelope import open_bytes

    letters: list[tuple[int, DeadLetter]] = []
    async with aclosing(bus.follow(("DLQ",))) as records:
        async for item in records:
            if isinstance(item, CaughtUp):
                break
            letters.append((item.sequence, open_bytes(item.data, item.subject).read(DeadLetter)))
    return letters


def _row(number: int, letter: DeadLetter) -> dict[str, Any]:
    from connito.errors import reason_name

    return {
        "number": number,
        "service": letter.service,
        "stream": letter.stream,
        "sequence": letter.sequence,
        "subject": letter.subject,
        "reason": reason_name(letter.reason),
        "detail": letter.detail,
    }


def _read(letter: DeadLetter) -> str:
    from connito.errors import Invalid
    from connito.wire.envelope import open_bytes

    try:
        opened = open_bytes(letter.body, letter.subject)
    except Invalid as error:
        return f"not readable: {error}"
    return f"{opened.type_name} by {opened.signer}, {len(opened.payload)} bytes"
