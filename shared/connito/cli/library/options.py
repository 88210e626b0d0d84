"""Options that the verbs of `connito library` share, as typer declares them and as Python takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from connito.curation.holdings import Agreement, Holdings
    from connito.library.governance import Permission

ShelfOption = Annotated[
    Path | None,
    typer.Option("--shelf", help="Folder of the local library [CONNITO_SHELF, or shelf/ in the data directory]."),
]


def base_folder(given: str) -> Path:
    """Return the folder that is named; of `demo` and `tiny` the one in which they were built here."""
    if given in ("demo", "tiny") and not Path(given).exists():
        from connito.base.recipes import cached_base

        built = cached_base(given) / "model"
        return built if built.is_dir() else Path(given)
    return Path(given)


def base_option(said: str, variable: str | None = None) -> Any:
    """Return the option `--base`."""
    return typer.Option("--base", parser=base_folder, metavar="DIR|NAME", envvar=variable, help=said)


BaseOption = Annotated[Path, base_option("Folder of the base model; or demo, tiny.")]
MeasureOption = Annotated[
    list[str] | None, typer.Option("--measure", help="NAME=FILE: measure on this domain's text too; may be repeated.")
]
OutOption = Annotated[Path, typer.Option("--out", help="New folder for the result.")]
DataOption = Annotated[list[Path], typer.Option("--data", help="Text of the domain; may be repeated.")]
AsOption = Annotated[str, typer.Option("--as", help="Viewer to act as, for experts that are not public.")]
OrganisationOption = Annotated[
    list[str] | None, typer.Option("--organisation", help="Organisation whose experts the viewer may see.")
]
AcceptOption = Annotated[list[str] | None, typer.Option("--accept-license", help="Terms you have read and accept.")]
CommercialFlag = Annotated[bool, typer.Option("--commercial", help="The result will be used commercially.")]
YankedFlag = Annotated[bool, typer.Option("--allow-yanked", help="Use experts that were yanked.")]


def holdings(
    shelf: Path | None, data_dir: Path | None, who: str = "", organisations: Sequence[str] | None = None
) -> Holdings:
    """Return where experts are looked up, and for whom."""
    from connito.curation.holdings import Holdings
    from connito.library.governance import Viewer
    from connito.platform.session import Session

    who, joined = (who, frozenset[str]()) if who else Session.acting(data_dir)
    return Holdings(shelf, data_dir, Viewer(who, joined | frozenset(organisations or ())))


def agreement(
    accepted: Sequence[str] | None, commercial: bool = False, redistribute: bool = False, allow_yanked: bool = False
) -> Agreement:
    """Return what the user agrees to and intends."""
    from connito.curation.holdings import Agreement

    return Agreement(tuple(accepted or ()), commercial, redistribute, allow_yanked)


def named_files(pairs: Sequence[str] | None) -> dict[str, Path]:
    """Read NAME=FILE pairs. Raises `Invalid` for what is none."""
    from connito.errors import Invalid

    found = {}
    for pair in pairs or []:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise Invalid(f"{pair!r} is not NAME=FILE, for example code=code.txt")
        found[name] = Path(path)
    return found


def obligations(permission: Permission) -> list[str]:
    """Return what a use obliges to, line by line."""
    lines = [f"  licence: {permission.license or 'not stated'}"]
    lines += [f"  credit: {name}" for name in permission.attribution]
    return lines + [f"  warning: {warning}" for warning in permission.warnings]
