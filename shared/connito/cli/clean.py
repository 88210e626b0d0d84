"""`connito clean`: collect what nobody refers to any more."""

from __future__ import annotations

from typing import Annotated

import typer

from connito.cli.audit import tell
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats
from connito.runtime.progress import silent


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

    What an archive took over with `connito archive --release` is found here, and uploads that came to nothing.
    """
    from connito.client.cleaning import clean as collect
    from connito.platform.session import Session

    session = Session.open(data_dir, role="operator")
    done = collect(session, older_than_s=3600 * older_than, remove=remove, say=silent if as_json else tell)
    stale, kept = (sum(one.size for one in objects) for objects in (done.stale, done.kept))
    document = {
        "stale": {"objects": len(done.stale), "bytes": stale}, "kept": {"objects": len(done.kept), "bytes": kept},
        "removed": remove,
    }  # fmt: skip
    verb = "removed" if remove else "would go (--remove deletes them)"
    emit(
        as_json,
        document,
        lambda: (
            f"{len(done.stale)} objects, {formats.size(stale)}, {verb}; {len(done.kept)}, {formats.size(kept)}, stay"
        ),
    )
