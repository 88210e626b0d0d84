"""Access to experts for the library's verbs, and the checks and records that all of them make.

Experts are named by their id on the shelf, by their id in the library of the running platform, or by a folder.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from connito.client import Client
    from connito.library.governance import Permission, Use, Viewer
    from connito.library.shelf import Shelf

Expert = tuple[Path, dict[str, Any]]  # folder, record

ShelfOption = Annotated[
    Path | None,
    typer.Option("--shelf", help="Folder of the local library [CONNITO_SHELF, or shelf/ in the data directory]."),
]
BaseOption = Annotated[Path, typer.Option("--base", help="Folder of the base model.")]
MeasureOption = Annotated[
    list[str] | None, typer.Option("--measure", help="NAME=FILE: measure on this domain's text too; may be repeated.")
]
OutOption = Annotated[Path, typer.Option("--out", help="New folder for the result.")]
DataOption = Annotated[list[Path], typer.Option("--data", help="Text of the domain; may be repeated.")]
AsOption = Annotated[str, typer.Option("--as", help="Who asks, for experts that are not public.")]
OrganisationOption = Annotated[list[str] | None, typer.Option("--organisation", help="Whose experts you may see.")]
AcceptOption = Annotated[list[str] | None, typer.Option("--accept-license", help="Terms you have read and accept.")]
CommercialFlag = Annotated[bool, typer.Option("--commercial", help="The result will be used commercially.")]
YankedFlag = Annotated[bool, typer.Option("--allow-yanked", help="Use experts that were yanked.")]

# Sequences that a text is cut into for measuring.
LENGTH = 128


def open_shelf(shelf: Path | None, data_dir: Path | None, *, make: bool = False) -> Shelf:
    """Return the local library that is meant. `NotFound` for a folder that was named and is not there, unless to
    `make` it.
    """
    from connito.errors import NotFound
    from connito.library.shelf import Shelf
    from connito.platform.datadir import default_data_dir

    given = os.environ.get("CONNITO_SHELF")
    if shelf is not None and not make and not shelf.is_dir():
        raise NotFound(f"there is no shelf at {shelf}; put an expert there with `connito library deposit`")
    return Shelf(shelf or (Path(given) if given and data_dir is None else (data_dir or default_data_dir()) / "shelf"))


def viewer_of(who: str, organisations: list[str] | None) -> Viewer:
    """Return the viewer who asks."""
    from connito.library.governance import Viewer

    return Viewer(who, frozenset(organisations or []))


def now_ms() -> int:
    """Return milliseconds since 1970."""
    return int(time.time() * 1000)


def now_iso() -> str:
    """Return the current time in the format of records."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def read_folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return an export: its folder and record. Raises `NotFound` and `Invalid`."""
    from connito.errors import Invalid, NotFound
    from connito.library.artifact import EXPERT_FILE, MODEL_FILE, RECORD_FILE

    held = (path / EXPERT_FILE).is_file() or (path / MODEL_FILE).is_file()
    if not held or not (path / RECORD_FILE).is_file():
        raise NotFound(
            f"{path} holds no expert: it needs {EXPERT_FILE} and {RECORD_FILE}, as `library export` writes them"
        )
    try:
        record: dict[str, Any] = json.loads((path / RECORD_FILE).read_bytes())
    except ValueError as error:
        raise Invalid(f"{path / RECORD_FILE} is not a record: {error}") from error
    return path, record


def find_expert(name: str, shelf: Path | None, data_dir: Path | None) -> tuple[Path, dict[str, Any]]:
    """Return an expert by folder, or by id: from the shelf, else fetched from the platform onto it."""
    from connito.errors import NotFound

    if Path(name).is_dir():
        return read_folder(Path(name))
    local = open_shelf(shelf, data_dir)
    try:
        return local.get(name)
    except NotFound as error:
        try:
            fetch(name, local, data_dir)
        except NotFound:
            raise error from None
        return local.get(name)


def cut_sequences(tokenizer: Any, texts: list[Path]) -> Any:
    """Return int32 [n, LENGTH + 1] from the texts in a row, or shorter where there is little text."""
    import numpy as np

    from connito.errors import Invalid, NotFound

    ids: list[int] = []
    for path in texts:
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
        ids += [*tokenizer(path.read_text(errors="replace"), verbose=False).input_ids, tokenizer.eos_token_id]
    length = min(LENGTH + 1, len(ids) // 2)
    if length < 8:
        raise Invalid(f"{', '.join(map(str, texts))} hold {len(ids)} tokens, too few to measure on: give more text")
    return np.asarray(ids[: len(ids) // length * length], dtype=np.int32).reshape(-1, length)


def halves(sequences: Any) -> tuple[Any, Any]:
    """Split sequences: every other one is for calibration, the rest for measurement."""
    return sequences[::2], sequences[1::2]


def digests(paths: list[Path]) -> list[str]:
    """Return SHA-256 of each file."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def obligations(permission: Permission) -> list[str]:
    """Return the obligations of a use, line by line."""
    lines = [f"  licence: {permission.license or 'not stated'}"]
    lines += [f"  credit: {name}" for name in permission.attribution]
    return lines + [f"  warning: {warning}" for warning in permission.warnings]


def platform(data_dir: Path | None) -> Client | None:
    """Return a client of the platform that runs here, None where none does."""
    from connito.client import Client
    from connito.errors import NotFound, Retry

    try:
        client = Client.local(data_dir)
        client.library.reach()
    except (NotFound, Retry):
        return None
    return client


def fetch(name: str, local: Shelf, data_dir: Path | None) -> None:
    """Mirror one expert of the platform's library. `NotFound` when none runs here or it has no such expert."""
    import asyncio

    from connito.client import Client
    from connito.platform.session import Session

    session = Session.open(data_dir, role="customer")
    with Client.local(data_dir) as client:
        summary, record = client.library.show(name)
        attestation = client.library.attestation(name)
    file = asyncio.run(session.store().fetch(summary.expert))
    local.deposit(file, record, summary.deposited_at_unix_ms, attestation or None)


def permit(
    found: list[Expert],
    use: Use,
    viewer: Viewer,
    shelf: Path | None,
    data_dir: Path | None,
    allow_yanked: bool,
) -> Permission:
    """Return whether these experts may be used so, by what shelf and platform say of them. Raises `Invalid`."""
    from connito.errors import NotFound
    from connito.library.governance import check_use

    names = [str(record["expert_id"]) for _, record in found]
    with open_shelf(shelf, data_dir).index() as index:
        standings = {name: index.standing(name) for name in names}
    client = platform(data_dir) if shelf is None else None
    if client is not None:
        with client:
            for name in names:
                with suppress(NotFound):
                    said = client.library.standing(name)
                    standings[name] = said if said.status != "good" else standings[name]
    records = [record for _, record in found]
    return check_use(records, use, standings=standings, viewer=viewer, allow_yanked=allow_yanked)


def meter(records: list[dict[str, Any]], verb: str, who: str, shelf: Path | None, data_dir: Path | None) -> None:
    """Write one use of each expert down: on the shelf, and in the platform's log where one runs and knows the expert."""
    from connito.errors import NotFound

    local, client = open_shelf(shelf, data_dir), platform(data_dir) if shelf is None else None
    for record in records:
        name = str(record["expert_id"])
        local.meter(name, verb, who, now_ms())
        if client is not None:
            with suppress(NotFound):
                client.library.meter(name, verb)
    if client is not None:
        client.close()


def named_texts(measure: list[str] | None) -> dict[str, Path]:
    """Parse NAME=FILE pairs. Raises `Invalid` for anything else."""
    from connito.errors import Invalid

    found = {}
    for pair in measure or []:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise Invalid(f"{pair!r} is not NAME=FILE, for example code=code.txt")
        found[name] = Path(path)
    return found
