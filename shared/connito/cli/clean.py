"""`connito clean`: collect what nobody refers to any more."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from connito.cli.audit import tell
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats
from connito.runtime.progress import silent

if TYPE_CHECKING:
    from connito.platform.datadir import DataDir


def clean(
    data_dir: DataDirOption = None,
    older_than: Annotated[
        float, typer.Option("--older-than", help="Hours since an object was written; what is younger stays.", min=0)
    ] = 24.0,
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete them. Without it they are counted and stay.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Find objects in the store that no message of the log names any more, and no base; with --remove, delete them.

    Where nothing runs: copies of what the store has, and what miners keep between cycles.

    What an archive took over with `connito archive --release` is found here, uploads that came to nothing, and what was
    said of runs that nobody has created.
    """
    from connito.client.cleaning import clean as collect
    from connito.platform.datadir import DataDir
    from connito.platform.session import Session

    folder = DataDir.at(data_dir)
    if folder.root.is_dir() and folder.read_platform() is None and not os.environ.get("CONNITO_NATS_URL"):
        _at_rest(folder, remove=remove, as_json=as_json)
        return
    session = Session.open(data_dir, role="operator")
    done = collect(session, older_than_s=3600 * older_than, remove=remove, say=silent if as_json else tell)
    stale, kept = (sum(one.size for one in objects) for objects in (done.stale, done.kept))
    document = {
        "stale": {"objects": len(done.stale), "bytes": stale}, "kept": {"objects": len(done.kept), "bytes": kept},
        "strays": len(done.strays), "removed": remove,
    }  # fmt: skip
    verb = "removed" if remove else "would go (--remove deletes them)"
    emit(
        as_json,
        document,
        lambda: (
            f"{formats.count(len(done.stale), 'object')}, {formats.size(stale)}, "
            f"{verb}; {len(done.kept)}, {formats.size(kept)}, stay\n"
            f"messages about {formats.count(len(done.strays), 'unknown run')} {verb}"
        ),
    )


def _at_rest(data: DataDir, *, remove: bool, as_json: bool) -> None:
    """Find, or delete, what an ended run takes and nothing needs."""
    from connito.local.footprint import superfluous, tidy

    with data.lock():
        room = tidy(data) if remove else superfluous(data)
    document = {"stale": {"objects": len(room.files), "bytes": room.bytes}, "removed": remove}
    verb = "removed" if remove else "would go (--remove deletes them)"
    emit(
        as_json,
        document,
        lambda: (
            f"{formats.count(len(room.files), 'copy')} and leftovers, "
            f"{formats.size(room.bytes)}, {verb}; the store and the log stay"
        ),
    )
