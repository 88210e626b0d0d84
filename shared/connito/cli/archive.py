"""`connito archive`: a run that has ended, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.audit import FromOption, tell
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats
from connito.runtime.progress import silent


def archive(
    run: Annotated[str, typer.Argument(help="The run's id, as `connito job list` shows it.")],
    file: Annotated[Path, typer.Argument(help="Where to write it; a file that is there already is checked instead.")],
    folder: FromOption = None,
    data_dir: DataDirOption = None,
    release: Annotated[
        bool, typer.Option("--release", help="Then drop the run's windows from the streams. Keep the file.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a run that has ended, with every artifact that an audit of it needs, into one file.

    `connito audit`, `explain` and `ledger` read it with `--from FILE`. Without `--release` nothing else changes.
    """
    from connito.audit import runs
    from connito.errors import Invalid

    if release and folder is not None:
        raise Invalid("--release needs the platform that runs; start it with `connito up --no-wait`, without --from")
    sealed = runs.archive(run, file, runs.AuditOptions(folder, data_dir, say=silent if as_json else tell))
    if release:
        runs.release(sealed, data_dir)
    document = {
        "run": run, "file": str(file), "sha256": sealed.digest, "bytes": sealed.bytes, "messages": sealed.messages,
        "objects": sealed.objects, "head": sealed.head, "released": release,
    }  # fmt: skip
    what = (
        f"{formats.count(sealed.messages, 'message')} and "
        f"{formats.count(sealed.objects, 'object')}, {formats.size(sealed.bytes)}"
    )
    then = "; its windows were released from the streams" if release else ""
    emit(as_json, document, lambda: f"{file}: {what}, SHA-256 {sealed.digest}{then}")
