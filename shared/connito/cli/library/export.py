"""`connito library`: export, verify, push and pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.library.options import (
    AcceptOption,
    AsOption,
    CommercialFlag,
    OrganisationOption,
    OutOption,
    ShelfOption,
    YankedFlag,
    agreement,
    base_option,
    holdings,
    obligations,
)
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats


def export(
    expert: Annotated[str, typer.Argument(help="Expert id or folder.")],
    out: OutOption,
    base: Annotated[Path | None, base_option("Write the whole model with the expert in it.")] = None,
    layout: Annotated[
        str, typer.Option("--format", help="delta, or with --base: hf (transformers 5), hf-hub (as published), gguf.")
    ] = "",
    who: AsOption = "",
    organisation: OrganisationOption = None,
    accept_license: AcceptOption = None,
    commercial: CommercialFlag = False,
    redistribute: Annotated[bool, typer.Option("--redistribute", help="It will be passed on to others.")] = False,
    allow_yanked: YankedFlag = False,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Export an expert: file, record and card; with --base, a whole checkpoint that transformers loads."""
    from connito.curation import exchange

    agreed = agreement(accept_license, commercial, redistribute, allow_yanked)
    done = exchange.export(expert, out, base, agreed, holdings(shelf, data_dir, who, organisation), layout)
    emit(as_json, done.document, lambda: "\n".join([f"written to {out}", *obligations(done.permission)]))


def verify(
    target: Annotated[str, typer.Argument(help="Expert id, folder of an expert, or folder of an exported model.")],
    base: Annotated[Path | None, base_option("Compare with, or recompute on, this base.")] = None,
    roster: Annotated[Path | None, typer.Option(help="The operator's roster, to check signers against.")] = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check an expert or an exported model offline: digests, signatures; with --base, recompute a composition."""
    from connito.curation import exchange

    checked = exchange.verify(target, base, roster, holdings(shelf, data_dir))
    emit(as_json, {"target": target, "verified": checked}, lambda: "\n".join(f"ok  {what}" for what in checked))


def push(
    target: Annotated[str, typer.Argument(help="Expert id, or folder of an expert or of an exported model.")],
    repository: Annotated[str, typer.Argument(help="Hugging Face repository, OWNER/NAME.")],
    revision: Annotated[str, typer.Option(help="Branch to commit to, made if it is not there.")] = "",
    public: Annotated[
        bool,
        typer.Option("--public", help="Make the repository open to everybody, if it is made; it is private otherwise."),
    ] = False,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    accept_license: AcceptOption = None,
    commercial: CommercialFlag = False,
    allow_yanked: YankedFlag = False,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Upload an expert or an exported model to a Hugging Face repository (HF_TOKEN, HF_ENDPOINT); again, it goes on."""
    from connito.curation import hub

    agreed = agreement(accept_license, commercial, True, allow_yanked)
    library = holdings(shelf, data_dir, who, organisation)
    done = hub.push(target, repository, revision=revision, public=public, agreement=agreed, library=library)
    document = {"address": done.address, "commit": done.commit, "files": done.files}
    emit(
        as_json,
        document,
        lambda: f"{formats.count(len(done.files), 'file')} at {done.address}, commit {done.commit}",
    )


def pull(
    repository: Annotated[str, typer.Argument(help="Hugging Face repository, OWNER/NAME.")],
    out: OutOption,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Download an expert or a model from a Hugging Face repository and verify it; again, it goes on."""
    from connito.curation import hub

    checked = hub.pull(repository, out, revision=revision)
    emit(as_json, {"folder": str(out), "verified": checked}, lambda: "\n".join(f"ok  {what}" for what in checked))
