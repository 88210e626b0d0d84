"""`connito miner`: an identity, taking part, and what became of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from connito.cli.library.options import base_option
from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.protocol.policy.choices import ADAMW, INNER_OPTIMIZERS, one_of
from connito.render import formats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from connito.views.leaderboard import Place

app = typer.Typer(no_args_is_help=True, help="Take part as a miner.")
KeyFile = Annotated[Path, typer.Option("--key", help="The miner's key file.", envvar="CONNITO_KEY_FILE")]
Residency = Literal["auto", "all", "four-bit", "helpers"]
DEFAULT_KEY = Path("miner.nk")


@app.command("init")
def init(
    key: KeyFile = DEFAULT_KEY,
    as_json: JsonFlag = False,
) -> None:
    """Create an identity: a key file that only you can read. An existing file is never overwritten."""
    from connito.errors import Invalid
    from connito.wire.identity import Identity

    if key.exists():
        raise Invalid(f"{key} exists, and losing a key loses its rewards: choose another --key, or use this one")
    identity = Identity.generate()
    identity.save(key)
    document = {"key_file": str(key), "public_key": identity.public}
    emit(
        as_json,
        document,
        lambda: (
            f"{identity.public}\n\nThe seed is in {key}; keep a copy. With an invite: connito miner run --key {key} --invite …\n"
            "Without: give the line above to the operator, then run\n"
            f"  connito miner join PASS --key {key}\n"
            f"  CONNITO_NATS_URL=nats://… CONNITO_ROSTER=roster.json connito miner run --key {key}\n"
            "with the pass, the address and the roster that the operator gives you."
        ),
    )


@app.command("join")
def join(
    text: Annotated[
        str,
        typer.Argument(
            metavar="PASS|INVITE", help="What the operator or a customer gave you, or the path of a file with it."
        ),
    ],
    key: KeyFile = DEFAULT_KEY,
    api: Annotated[
        str, typer.Option(help="The coordinator's API (host:port), where the invite names none or another one.")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Put a pass into the key file: with it the broker lets the key in. An invite is changed for one first."""
    from connito.client.joining import join as let_in

    identity, told = let_in(text, key, api)
    emit(
        as_json,
        {
            "key_file": str(key),
            "public_key": identity.public,
            "passes": len(identity.passes),
            "bus": told.bus,
            "roster": told.roster,
        },
        lambda: (
            f"{identity.public} may log in; start it with\n  "
            + ("" if told.bus else "CONNITO_NATS_URL=nats://… CONNITO_ROSTER=roster.json ")
            + f"connito miner run --key {key}"
        ),
    )


@app.command("run")
def run(
    key: KeyFile = DEFAULT_KEY,
    label: Annotated[str, typer.Option(help="A name to show beside the key.", envvar="CONNITO_LABEL")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, and log JSON lines on stderr from then on.")
    ] = False,
    invite: Annotated[
        str,
        typer.Option(
            help="Invitation token. It is all that a newcomer needs: a key is made and let in.", envvar="CONNITO_INVITE"
        ),
    ] = "",
    bus: Annotated[
        str, typer.Option(help="The broker's address. Default: as told with the invite.", envvar="CONNITO_NATS_URL")
    ] = "",
    roster: Annotated[
        Path | None, typer.Option(help="The operator's roster. Default: as above.", envvar="CONNITO_ROSTER")
    ] = None,
) -> NoReturn:
    """Take part until interrupted: run the trainer with this key. Other settings: CONNITO_… variables."""
    import sys

    from connito.client.joining import admitted
    from connito.errors import Invalid
    from connito.runtime.programs import service_module

    identity, told = admitted(key, invite)  # Says what is wrong before a process is started for it.
    address = bus or told.bus
    if not address:
        raise Invalid(
            "nobody said where the broker is: add --invite TOKEN, or --bus nats://host:port (CONNITO_NATS_URL) as the "
            "operator tells you"
        )
    chosen = {
        "CONNITO_KEY_FILE": str(key.absolute()),
        "CONNITO_LOG_FORMAT": "json" if as_json else "console",
        "CONNITO_NATS_URL": address,
        "CONNITO_ROSTER": str(roster or told.roster),
        "CONNITO_INVITE": told.invite or invite,
        "CONNITO_LABEL": label,
    }
    environment = {**os.environ, **{name: value for name, value in chosen.items() if value}}
    if as_json:
        emit(as_json, {"miner": identity.public, "bus": address, "key_file": str(key.absolute())}, str)
        sys.stdout.flush()
    command = [sys.executable, "-P", "-m", service_module("trainer")]
    os.execve(sys.executable, command, environment)  # noqa: S606 - no shell


@app.command("fits")
def fits(
    base: Annotated[Path, base_option("Folder of the base model, whose config.json is enough; or demo, tiny.")],
    selection: Annotated[Path | None, typer.Option(help="What `connito select --json` printed.")] = None,
    experts: Annotated[int, typer.Option(min=0, help="Without a selection: so many targets in every layer.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 128,
    micro_batch: Annotated[int, typer.Option(min=0, help="Sequences that go through the model at once; 0: all.")] = 0,
    bf16_parameters: Annotated[bool, typer.Option(help="Frozen weights in bfloat16.")] = False,
    residency: Annotated[Residency, typer.Option(help="Frozen experts to hold; auto: the best that fits.")] = "auto",
    cuda: Annotated[bool, typer.Option("--cuda", help="For a GPU, wherever this is asked.")] = False,
    optimizer: Annotated[str, typer.Option(help=f"The run's training.optimizer: {one_of(INNER_OPTIMIZERS)}.")] = ADAMW,
    memory_bytes: Annotated[int, typer.Option(min=0, help="Memory to fit into; 0: what is free here.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Predict the memory of training a selection, before anything is loaded, and the settings that make it fit; exit 3
    when none do.
    """
    from connito.errors import Invalid
    from connito.moe.footprint import SWITCHES, Workload, fit, free_bytes, lean
    from connito.moe.residency import ALL, AUTO
    from connito.workloads.predicting import predictor
    from connito.workloads.rehearsal import config_of, same_everywhere

    if optimizer not in INNER_OPTIMIZERS:
        raise Invalid(f"unknown optimizer {optimizer!r}: use {one_of(INNER_OPTIMIZERS)}")
    if (selection is None) == (not experts):
        raise Invalid("give either --selection FILE, or --experts N for so many targets in every layer")
    config = config_of(base)
    targets, helpers = (same_everywhere(config, experts), {}) if selection is None else _experts(selection)
    predict = predictor(config, targets, helpers)
    work = Workload(
        sequences,
        length,
        bf16_parameters,
        micro_batch=micro_batch,
        residency=ALL if residency == AUTO else residency,
        packed=True,
        cuda=cuda,
        inner=optimizer,
    )
    have = memory_bytes or free_bytes()
    switches = tuple(switch for switch in SWITCHES if switch.field != "residency" or residency == AUTO)
    chosen, turned = lean(predict, work, have, switches)
    need = predict(chosen)
    settings = {switch.setting: switch.costs for switch in turned}
    numbers = {**need.to_json(), "available": have}
    emit(
        as_json,
        {**numbers, "residency": chosen.residency, "fits": need.total <= have, "settings": settings},
        lambda: "\n".join(
            [
                f"{'residency':<12}{chosen.residency:>10}",
                *(f"{name:<12}{formats.size(value):>10}" for name, value in numbers.items()),
                *(f"with {setting}: {costs}" for setting, costs in settings.items()),
            ]
        ),
    )
    fit(predict, work if need.total > have else chosen, have, "--memory-bytes" if memory_bytes else "this machine")


def _experts(path: Path) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return targets and helpers by layer from the file. Raises `Invalid` when it is no selection."""
    from connito.data.documents import parse_json
    from connito.errors import Invalid

    try:
        data = parse_json(path.read_text())
        targets, helpers = (
            {int(layer): [int(e) for e in experts] for layer, experts in data.get(name, {}).items()}
            for name in ("layers", "helpers")
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Invalid(f"{path} is not a selection ({error}); make one with `connito select --json > FILE`") from error
    if not targets:
        raise Invalid(f"{path} selects no expert; make one with `connito select --json > FILE`")
    return targets, helpers


@app.command("status")
def status(
    key: KeyFile = DEFAULT_KEY,
    public_key: Annotated[str, typer.Option(help="Any miner's public key instead of a key file.")] = "",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what was accepted, what was rejected and why, ranks, rewards and ratings (μ ± σ), for every run and cycle."""
    from connito.client import runs
    from connito.platform.session import Session
    from connito.wire.identity import Identity

    miner = public_key or Identity.load(key).public
    if not public_key:
        # Elsewhere than on the platform's own machine, the miner's key is the one to read with.
        os.environ.setdefault("CONNITO_KEY_FILE", str(key))
    rows = runs.miner(Session.open(data_dir, role="customer", wake=True), miner)
    headers = ("run", "cycle", "status", "reason", "utility", "rank", "reward", "rating", "detail")
    total = sum(row["reward"] for row in rows)
    emit(
        as_json,
        {"miner": miner, "reward": total, "cycles": rows},
        lambda: (
            table(headers, [_cells(row, headers) for row in rows], "this miner has taken part in no cycle yet")
            + f"\n\nreward in all: {total}"
        ),
    )


@app.command("top")
def top(
    key: KeyFile = DEFAULT_KEY,
    limit: Annotated[int, typer.Option(min=1, help="Miners to show; yours is shown anyway.")] = 20,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show who earned how much over all runs: rank, merged submissions, rating, and what was held against them. Yours is
    marked where the key file is there.
    """
    from connito.client import runs
    from connito.platform.session import Session
    from connito.wire.identity import Identity, short_key

    mine = Identity.load(key).public if key.exists() else ""
    if mine:
        os.environ.setdefault("CONNITO_KEY_FILE", str(key))
    places = runs.top(Session.open(data_dir, role="customer", wake=True))
    shown = [place for number, place in enumerate(places) if number < limit or place.miner == mine]
    headers = ("", "rank", "miner", "reward", "runs", "judged", "merged", "rating", "why not more")
    rows = [
        ("→" if p.miner == mine else "", p.rank, p.label or short_key(p.miner), p.reward, len(p.earned), p.judged, p.merged,
         p.skill, p.why) for p in shown
    ]  # fmt: skip
    emit(
        as_json,
        {"miner": mine, "miners": len(places), "places": [place.to_json() for place in shown]},
        lambda: table(headers, rows, "nobody has taken part in a cycle yet") + _own(mine, key, places),
    )


def _own(mine: str, key: Path, places: Sequence[Place]) -> str:
    """Return the caller's earnings by run, and the command that recomputes the last of them."""
    place = next((place for place in places if place.miner == mine), None)
    if place is None:
        return ""
    lines = [f"{units:>12}  {run}" for run, units in place.earned.items()]
    command = f"CONNITO_KEY_FILE={key} connito explain RUN/CYCLE/{mine}"
    return "\n".join(["\n", "you earned", *lines, f"each cycle: connito miner status --key {key}", f"why: {command}"])


def _cells(row: dict[str, Any], headers: tuple[str, ...]) -> list[Any]:
    from connito.views.standings import rating_text

    return [rating_text(row["rating"]) if header == "rating" else row[header] for header in headers]
