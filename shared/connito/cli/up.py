"""`connito up` and `connito down`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.protocol.policy.choices import ADVERSARIES, one_of


# Long: one option after the other.
def up(
    cycles: Annotated[int, typer.Option(help="Cycles of the run.")] = 3,
    miners: Annotated[int, typer.Option(help="Honest miners to start.")] = 3,
    validators: Annotated[int, typer.Option(help="Validators to start.")] = 3,
    adversaries: Annotated[
        str,
        typer.Option(
            metavar="KIND[,KIND]",
            help=f"Misbehaving miners: {one_of(ADVERSARIES)}.",
        ),
    ] = "",
    domain: Annotated[
        str,
        typer.Option(help="Domain to adapt to: medical, code, legal, speeches, math (tiny base: recipes, logs, …)."),
    ] = "",
    base: Annotated[str, typer.Option(metavar="NAME|DIR", help="demo, tiny, or the folder of a base model.")] = "demo",
    data_dir: DataDirOption = None,
    report: Annotated[Path | None, typer.Option(help="Write the report here too.")] = None,
    seed: Annotated[int | None, typer.Option(help="Make keys, beacon and training reproducible.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.FIELD=VALUE",
            help="Change a policy of the run, for example training.local_steps=5.",
        ),
    ] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Cancel the run that is unfinished here and start another one.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the first cycle is open.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run everything on this machine: brokers, store, services, validators and miners, and one adaptation job.

    Where an earlier run in the folder is unfinished, go on with that one.
    """
    from connito.local.defaults import UpOptions
    from connito.local.outcome import summary
    from connito.local.up import run_detached, run_here
    from connito.runtime.extras import require

    require("torch", "transformers", "cryptography", "psutil")
    kinds = tuple(kind.strip() for kind in adversaries.split(",") if kind.strip())
    options = UpOptions(
        cycles=cycles,
        miners=miners,
        validators=validators,
        adversaries=kinds,
        domain=domain,
        base=base,
        data_dir=data_dir,
        report=None if report is None else report.absolute(),
        seed=seed,
        overrides=tuple(policy or ()),
        new=new,
    ).checked()
    if no_wait:
        started = run_detached(options, as_json=as_json)
        emit(
            as_json,
            started,
            lambda: f"run {started['run']} is under way in {started['data_dir']}; stop it with `connito down`",
        )
        return
    document = run_here(options, as_json=as_json)
    emit(as_json, document, lambda: summary(document, options))


def down(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Stop the platform that `connito up --no-wait` left running. Its files stay."""
    from connito.local.up import stop
    from connito.platform.datadir import DataDir

    data = DataDir.at(data_dir)
    pid = stop(data)
    emit(
        as_json,
        {"data_dir": str(data.root), "stopped": pid},
        lambda: f"stopped process {pid} and all that it ran" if pid else f"nothing runs in {data.root}",
    )
