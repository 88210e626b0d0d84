"""`connito library`: deposit, mark and ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.library.options import (
    AsOption,
    OrganisationOption,
    ShelfOption,
    holdings,
)
from connito.cli.output import DataDirOption, JsonFlag, emit, table


def deposit(
    expert: Annotated[Path, typer.Argument(help="Folder of an export, a pruning or an extraction.")],
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Add an expert, or a model made of experts, to the shelf, and to the running platform's library what is made of its own."""
    from connito.curation import joining

    done = joining.deposit(expert, holdings(shelf, data_dir))
    name, digest = done.record["expert_id"], done.record["expert"]["digest"]
    where = "in the platform's library and on the shelf" if done.on_platform else f"on the shelf alone: {done.why}"
    document = {"expert_id": name, "digest": digest, "on_platform": done.on_platform}
    emit(as_json, document, lambda: f"deposited {name} {where}")


def mark(
    subject: Annotated[str, typer.Argument(help="Expert id; for opted-out and opted-in, the data source.")],
    status: Annotated[str, typer.Argument(help="deprecated, yanked, restored, opted-out or opted-in.")],
    reason: Annotated[str, typer.Option(help="Reason, shown to everyone who asks for the expert.")],
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Deprecate, yank or restore an expert, or take a data source out of the library."""
    from connito.curation import catalogue

    catalogue.mark(subject, status, reason, holdings(shelf, data_dir))
    emit(as_json, {"subject": subject, "status": status, "reason": reason}, lambda: f"{subject} is {status}: {reason}")


def ledger(
    expert: Annotated[str, typer.Argument(help="Expert id.")],
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show how often an expert was used, for what, and the miners that its use is credited to."""
    from connito.curation import catalogue

    document = catalogue.ledger(expert, holdings(shelf, data_dir, who, organisation))
    uses, credited = sorted(document["uses"].items()), sorted(document["credited"].items(), key=lambda row: -row[1])
    tables = (
        table(("use", "units"), uses, "never used"),
        table(("miner", "credited units"), credited, "nobody to credit"),
    )
    emit(as_json, {"expert_id": expert, **document}, lambda: "\n\n".join(tables))
