"""`connito serve`: an OpenAI-compatible server over one base and the experts of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from connito.cli.library.options import (
    AcceptOption,
    AsOption,
    CommercialFlag,
    OrganisationOption,
    ShelfOption,
    YankedFlag,
    agreement,
    base_option,
    holdings,
)
from connito.cli.output import DataDirOption, DeviceOption, JsonFlag, emit


def _variable(name: str) -> str:
    return f"CONNITO_SERVE_{name}"


def serve(
    base: Annotated[Path, base_option("Folder of the base model; or demo, tiny.", _variable("BASE"))],
    name: Annotated[str, typer.Option(envvar=_variable("NAME"), help="Its name in requests; its own without.")] = "",
    host: Annotated[str, typer.Option(envvar=_variable("HOST"), help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar=_variable("PORT"), help="Its port; 0 takes a free one.")
    ] = 8000,
    keys: Annotated[
        Path | None, typer.Option(envvar=_variable("KEYS"), help="YAML of users: key, name, organisations.")
    ] = None,
    experts: Annotated[
        int, typer.Option(min=1, envvar=_variable("EXPERTS"), help="Experts and compositions in memory at once.")
    ] = 32,
    cache_tokens: Annotated[
        int, typer.Option(min=64, envvar=_variable("CACHE_TOKENS"), help="Tokens of all requests together.")
    ] = 16384,
    batch_tokens: Annotated[
        int, typer.Option(min=8, envvar=_variable("BATCH_TOKENS"), help="Tokens computed in one step.")
    ] = 512,
    requests: Annotated[int, typer.Option(min=1, envvar=_variable("REQUESTS"), help="Requests computed at once.")] = 32,
    waiting: Annotated[int, typer.Option(min=1, envvar=_variable("WAITING"), help="Requests accepted at once.")] = 256,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    accept_license: AcceptOption = None,
    commercial: CommercialFlag = False,
    allow_yanked: YankedFlag = False,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Serve a base and every expert of it under OpenAI's interface: models BASE, BASE+EXPERT, BASE+A+B, BASE+A|B."""
    from connito.data.checkpoint_files import find_checkpoint

    find_checkpoint(base)  # Before what computes is imported, which takes seconds.
    if not as_json:
        typer.echo(f"loading {base}", err=True)
    from connito.curation.serving.run import ServeOptions, serve

    options = ServeOptions(
        base, name, host, port, keys, experts, cache_tokens, batch_tokens, requests, waiting,
        agreement=agreement(accept_license, commercial, allow_yanked=allow_yanked),
    )  # fmt: skip

    def began(address: str) -> None:
        emit(as_json, {"address": address}, lambda: f"{address}  (stop it with Ctrl-C)")
        sys.stdout.flush()

    serve(options, holdings(shelf, data_dir, who, organisation), began)
