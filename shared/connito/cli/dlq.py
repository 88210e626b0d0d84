"""`connito dlq`: messages that could not be handled, why, and handing them back."""

from __future__ import annotations

from typing import Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table

app = typer.Typer(no_args_is_help=True, help="Messages that will not be handled, and why.")
Sequence = Annotated[int, typer.Argument(help="Number in the DLQ stream, as `dlq ls` shows it.")]


@app.command("ls")
def ls(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """List dead letters, oldest first."""
    from connito.client import dead_letters
    from connito.platform.session import Session

    rows = [letter.to_json() for letter in dead_letters.ls(Session.open(data_dir, role="operator", wake=True))]
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
    """Show one dead letter and the readable part of its message."""
    from connito.client import dead_letters
    from connito.platform.session import Session

    found = dead_letters.show(Session.open(data_dir, role="operator", wake=True), number)
    document = {**found.to_json(), "body_bytes": len(found.letter.body), "message": found.message()}
    emit(as_json, document, lambda: "\n".join(f"{key:<11} {value}" for key, value in document.items()))


@app.command("retry")
def retry(number: Sequence, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Return a message to the service that could not handle it, with its original signature."""
    from connito.client import dead_letters
    from connito.platform.session import Session

    subject = dead_letters.retry(Session.open(data_dir, role="operator"), number).letter.subject
    emit(as_json, {"retried": number, "subject": subject}, lambda: f"{subject} was handed back")
