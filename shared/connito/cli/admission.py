"""`connito invite` and `connito ban`: admit miners by token, and ban them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats

if TYPE_CHECKING:
    from connito.platform.session import Session

_UNITS = {"m": 60, "h": 3600, "d": 86400}
Run = Annotated[str, typer.Option("--run", help="This run only; without it every run, which only operators may do.")]


def invite(
    run: Run = "",
    uses: Annotated[int, typer.Option(min=1, help="Keys that may use it.")] = 1,
    expires: Annotated[str, typer.Option(help="How long it is valid: 30m, 12h, 7d.")] = "7d",
    note: Annotated[str, typer.Option(help="A note about who is invited; anyone with the token can read it.")] = "",
    api: Annotated[
        str, typer.Option(help="The coordinator's API (host:port) as guests reach it. Default: where it says it is.")
    ] = "",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a token that lets miners in: to the bus, and to runs by invitation. Signed by the run's customer, or by an
    operator.
    """
    import secrets

    from connito.platform.session import Session
    from connito.v1.run_pb2 import Invite
    from connito.wire.invites import issue

    session = Session.open(data_dir, role="customer" if run else "operator")
    until = time.time() + seconds(expires)
    where_to = api or _coordinator(session)
    message = Invite(
        id=secrets.token_hex(8), run=run, expires_unix_ms=int(until * 1000), uses=uses, note=note, api=where_to
    )
    token = issue(session.identity, message)
    document = {
        "token": token,
        "id": message.id,
        "run": run,
        "uses": uses,
        "expires_unix_ms": message.expires_unix_ms,
        "note": note,
        "api": where_to,
    }
    where = f"run {run}" if run else "every run by invitation"
    when = formats.moment(1000 * until)
    emit(
        as_json,
        document,
        lambda: (
            f"{token}\n\nfor {where}, {uses} key{'s' * (uses != 1)}, until {when}\n  connito miner join …\n"
            "  connito miner run --invite …"
        ),
    )


def _coordinator(session: Session) -> str:
    """Return where the coordinator says its API is; empty where nobody can be asked now."""
    import asyncio

    from connito.errors import Retry

    try:
        return asyncio.run(session.endpoints("coordinator"))["coordinator"]
    except Retry:
        return ""


def ban(
    key: Annotated[str, typer.Argument(help="The miner's public key, or its beginning if that names one miner.")],
    why: Annotated[str, typer.Option(help="Reason, shown to the miner and to auditors.")] = "",
    run: Run = "",
    lift: Annotated[bool, typer.Option("--lift", help="Take a ban back.")] = False,
    access: Annotated[
        Path | None,
        typer.Option("--access", help="Close the broker to the key as well, or open it again, by this folder of keys."),
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Ban a key at once: its messages are refused from now on, and its work that is not merged yet does not count."""
    from connito.client import Client
    from connito.errors import Invalid
    from connito.platform.session import Session

    if not why and not lift:
        raise Invalid("a reason is required, for the miner and for auditors: add --why TEXT")
    with Client.local(data_dir, role="customer" if run else "operator") as client:
        miner = client.job.miner(key)
        runs = client.ban(miner, why, run, lifted=lift)
        if access is not None:
            url = Session.open(data_dir, role="customer" if run else "operator").nats_url
            _admit_or_revoke(access, miner, url, lift=lift)
    word = "readmitted to" if lift else "banned from"
    emit(
        as_json,
        {"miner": miner, "lifted": lift, "why": why, "runs": runs, "broker": access is not None},
        lambda: (
            f"{miner} is {word} {', '.join('every new run' if name == 'installation' else name for name in runs)}"
            + (
                ""
                if lift or access
                else "\nto close the broker to it as well: connito access revoke …, or --access FOLDER"
            )
        ),
    )


def _admit_or_revoke(folder: Path, miner: str, url: str, *, lift: bool) -> None:
    import asyncio
    import os

    from connito.platform.access import Access
    from connito.wire.tls import Tls

    access = Access.open(folder)
    access.add([miner]) if lift else access.revoke([miner])
    asyncio.run(access.accounts.push(url, Tls.from_environment(os.environ)))


def seconds(text: str) -> float:
    """Return `30m`, `12h`, `7d` as seconds. Raises `Invalid`."""
    from connito.errors import Invalid

    match = re.fullmatch(r"(\d{1,6})([mhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise Invalid(f"{text!r} is no length of time; write 30m, 12h or 7d")
    return float(int(match[1]) * _UNITS[match[2]])
