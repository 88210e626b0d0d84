"""Output of every command: one JSON document or text for people, and typed errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from connito.render.formats import percent
from connito.runtime.progress import listening

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of the local platform [CONNITO_DATA_DIR, or .connito].",
        show_default=False,
        readable=False,  # Whoever opens it says what is wrong with it, and what to do.
    ),
]


def _use_device(name: str) -> str:
    """Make models run on `name` in this process. Raises `NoDevice` before anything else is done."""
    if name:
        from connito.moe.device import DEVICE, devices_of

        os.environ[DEVICE] = name
        devices_of()
    return name


DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        callback=_use_device,
        help="Device of the model: cpu, cuda, cuda:1, … [CONNITO_DEVICE, or the first GPU, or the CPU].",
        show_default=False,
    ),
]


def emit(as_json: bool, document: Any, text: Callable[[], str]) -> None:
    """Print the document, or the text made for people."""
    shown = json.dumps(document, indent=2) if as_json else text()
    _clear()
    typer.echo(shown)


def told(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb that says what it is at, in the way of `progress`."""

    @wraps(verb)
    def saying(*args: Any, **kwargs: Any) -> None:
        with progress(quiet=bool(kwargs.get("as_json"))) as tell, listening(lambda what: tell(what, None)):
            verb(*args, **kwargs)

    return saying


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], empty: str = "nothing yet") -> str:
    """Return columns aligned by their widest cell; numbers to the right."""
    if not rows:
        return empty
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(header), *(len(row[i]) for row in cells)) for i, header in enumerate(headers)]
    right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()

    return "\n".join([line([header.upper() for header in headers]), *(line(row) for row in cells)])


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, float | None], None]]:
    """Report progress on stderr: in place on a terminal, a line a step elsewhere, nothing if `quiet`."""
    last = [""]

    def tell(what: str, share: float | None) -> None:
        if quiet or what == last[0]:
            return
        last[0] = what
        if sys.stderr.isatty():
            print(
                f"\r\033[K{'' if share is None else percent(share, 0):>5}  {what}", end="", file=sys.stderr, flush=True
            )
            _in_place[0] = True
        else:
            print(what, file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        _clear()


# Whether a line of progress stands on the terminal, in which the next words would begin.
_in_place = [False]


def _clear() -> None:
    if _in_place[0]:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        _in_place[0] = False
