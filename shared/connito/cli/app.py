"""The verbs, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from connito.cli import (
    access,
    admission,
    advisories,
    archive,
    audit,
    backup,
    base,
    clean,
    console,
    dlq,
    doctor,
    evaluate,
    explain,
    job,
    ledger,
    library,
    miner,
    payouts,
    replay,
    select,
    serve,
    status,
    streams,
    up,
    witness,
)

app = typer.Typer(
    name="connito",
    help="Improve open Mixture-of-Experts language models by pieces: train, judge, merge and keep single experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Accept the options that stand before a verb."""
    if version:
        from connito import __version__

        typer.echo(f"connito {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.Exit(2)


app.command("up")(up.up)
app.command("down")(up.down)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.command("console")(console.console)
app.command("evaluate")(evaluate.evaluate)
app.command("serve")(serve.serve)
app.command("replay")(replay.replay)
app.command("select")(select.select)
app.command("explain")(explain.explain)
app.command("audit")(audit.audit)
app.command("archive")(archive.archive)
app.command("clean")(clean.clean)
app.command("backup")(backup.backup)
app.command("restore")(backup.recover)
app.command("witness")(witness.witness)
app.command("ledger")(ledger.ledger)
app.command("advisories")(advisories.advisories)
app.command("ban")(admission.ban)
app.command("invite")(admission.invite)
app.add_typer(access.app, name="access")
app.add_typer(streams.app, name="streams")
app.add_typer(dlq.app, name="dlq")
app.add_typer(base.app, name="base")
app.add_typer(job.app, name="job")
app.add_typer(miner.app, name="miner")
app.add_typer(payouts.app, name="payouts")
app.add_typer(library.app, name="library")
