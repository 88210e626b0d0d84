"""`connito backup` and `connito restore`: streams and objects of a platform as files, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.audit import tell
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats
from connito.runtime.progress import silent

if TYPE_CHECKING:
    from connito.client.backups import Backup

Folder = Annotated[Path, typer.Argument(help="Folder of the backup.")]


def backup(folder: Folder, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Copy what cannot be made again into a folder: the streams as they were at one moment, and all objects of the store.

    Of a platform of `connito up` also the shelf, and the run that it goes on with. The platform may run meanwhile.
    Objects that the folder has already are not read again. Keys and the roster are not in it. Needs the operator's key and
    credentials that may list the store.
    """
    from connito.client import backups
    from connito.platform.session import Session

    session = Session.open(data_dir, role="operator", wake=True)
    done = backups.backup(session, folder, say=silent if as_json else tell)
    emit(
        as_json, _document(done, folder), lambda: f"{_text(done)}, of {done.at:%Y-%m-%d %H:%M:%S} UTC, are in {folder}"
    )


def recover(
    folder: Folder,
    replicas: Annotated[int, typer.Option(min=0, max=5, help="Copies of each stream; 0: as many as it had.")] = 0,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the streams and objects of a platform again from a folder that `connito backup` wrote.

    Into an empty broker, before any service runs; objects that the store has already stay, and files that the folder of
    `connito up` has. Everything is verified.
    """
    from connito.client import backups
    from connito.platform.datadir import DataDir
    from connito.platform.resting import make_room
    from connito.platform.session import Session

    make_room(DataDir.at(data_dir))
    session = Session.open(data_dir, role="operator", wake=True)
    done = backups.recover(session, folder, replicas=replicas, say=silent if as_json else tell)
    emit(as_json, _document(done, folder), lambda: f"{_text(done)} are restored, as of {done.at:%Y-%m-%d %H:%M:%S} UTC")


def _document(done: Backup, folder: Path) -> dict[str, Any]:
    ends = {name: saved.last_sequence for name, saved in done.streams.items()}
    counts = {"objects": len(done.objects), "files": len(done.files)}
    return {"folder": str(folder), "at": done.at.isoformat(), "streams": ends, **counts}


def _text(done: Backup) -> str:
    beside = f", {formats.count(len(done.files), 'file')} beside them" if done.files else ""
    return f"{formats.count(len(done.streams), 'stream')} and {formats.count(len(done.objects), 'object')}{beside}"
