"""`connito payouts`: a run's ledger for whoever pays, as a signed file or as the weights of a Bittensor subnet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.audit import FromOption
from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.render import formats

app = typer.Typer(no_args_is_help=True, help="A run's ledger for whoever pays: signed files, weights of a subnet.")
Run = Annotated[str, typer.Argument(help="The run's id.")]
U16 = 65535


@app.command("export")
def export(
    run: Run,
    file: Annotated[Path, typer.Argument(help="Where to write it, with its signature beside it: .csv or .parquet.")],
    key: Annotated[
        Path | None,
        typer.Option(
            help="Key file to sign with [CONNITO_KEY_FILE, or the platform's customer.nk].", show_default=False
        ),
    ] = None,
    folder: FromOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write what every cycle of a run paid to whom into one file, and sign it."""
    from connito.client import payouts

    document = payouts.export(run, file, key, folder, data_dir)
    emit(
        as_json,
        document,
        lambda: f"{file}: {formats.count(document['rows'], 'row')}, signed by {document['signer']} in {file.name}.sig",
    )


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="An exported file, with its .sig beside it.")],
    by: Annotated[str, typer.Option(help="Public key that has to have signed it.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Say who signed an exported file. Exits with 6 if nobody, or somebody else, did."""
    from connito.client import payouts

    document = payouts.verify(file, by)
    whose = "" if by else "; that this is the key you expect, `--by` checks"
    emit(as_json, document, lambda: f"{file} is signed by {document['signer']}{whose}")


@app.command("bind")
def bind(
    hotkey: Annotated[str, typer.Argument(help="The hotkey's ss58 address.")],
    key: Annotated[Path, typer.Option(help="The miner's key file.")],
    signature: Annotated[
        str, typer.Option(help="The hotkey's signature, in hexadecimal; without it, what to sign is printed.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Where to write the binding.")] = Path("hotkey.json"),
    as_json: JsonFlag = False,
) -> None:
    """Bind a Bittensor hotkey to a miner's key, signed by both."""
    from connito.client import hotkeys
    from connito.wire.identity import Identity

    identity = Identity.load(key)
    line = hotkeys.statement(identity.public, hotkey)
    if not signature:
        emit(as_json, {"statement": line}, lambda: f'btcli wallet sign --use-hotkey --message "{line}"')
        return
    note = hotkeys.bind(identity, hotkey, signature, out)
    emit(as_json, {"file": str(out), **note}, lambda: f"{out}: {identity.public} and {hotkey} are bound")


@app.command("weights")
def weights(
    run: Run,
    first: Annotated[int, typer.Option(min=1, help="First cycle that counts.")],
    last: Annotated[int, typer.Option(min=1, help="Last cycle that counts.")],
    bindings: Annotated[list[Path], typer.Option("--binding", help="A binding, or a folder of them.")],
    metagraph: Annotated[Path, typer.Option(help="JSON list of the subnet's hotkeys in the order of their UIDs.")],
    max_weight: Annotated[int, typer.Option(min=1, max=U16, help="The subnet's MaxWeightsLimit, of 65,535.")] = U16,
    min_allowed: Annotated[int, typer.Option(min=0, max=U16, help="The subnet's MinAllowedWeights.")] = 0,
    folder: FromOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Turn what a run paid in some cycles into the weights that a subnet's validator sets. Nothing is sent anywhere."""
    from connito.client import hotkeys

    document = hotkeys.weights(run, (first, last), bindings, metagraph, max_weight, min_allowed, folder, data_dir)
    rows = [*zip(document["uids"], document["units"], document["weights"], strict=True)]
    left = "".join(
        f"\nleft out, without a UID: {miner}, {formats.count(units, 'unit')}"
        for miner, units in document["left_out"].items()
    )
    emit(as_json, document, lambda: table(("uid", "units", "weight"), rows) + left)
