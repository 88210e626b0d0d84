"""`connito access`: an installation's keys, and whom its broker lets in."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.render import formats

if TYPE_CHECKING:
    from connito.platform.access import Access

app = typer.Typer(
    no_args_is_help=True, help="Make, admit, revoke and rotate the keys of an installation, without downtime."
)
Folder = Annotated[Path, typer.Argument(help="The folder with the keys, for example deploy/secrets.")]
Keys = Annotated[list[str], typer.Argument(help="Miners' public keys, as `connito miner init` prints them.")]
PidFile = Annotated[
    Path | None,
    typer.Option(
        "--reload", help="The nats-server's pid file: make it read nats.conf again, for renewed certificates."
    ),
]
Broker = Annotated[
    str,
    typer.Option(
        "--bus", help="Tell this running broker at once. Default: the one that `connito up` runs on the folder."
    ),
]


@app.command("export")
def export(
    folder: Folder,
    validators: Annotated[int, typer.Option(help="Validators that have a key.")] = 3,
    miner: Annotated[list[str] | None, typer.Option(help="Admit this miner; repeatable.")] = None,
    tls_cert: Annotated[str, typer.Option(help="The broker's certificate, as the broker sees the path.")] = "",
    tls_key: Annotated[str, typer.Option(help="Its key.")] = "",
    tls_client_ca: Annotated[str, typer.Option(help="Ask clients for certificates of this authority (mTLS).")] = "",
    bus: Broker = "",
    reload: PidFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Make keys, accounts, roster and the broker's configuration; existing keys are kept. Safe to repeat."""
    from connito.errors import Invalid
    from connito.platform.access import Access, Tls

    if bool(tls_cert) != bool(tls_key) or (tls_client_ca and not tls_cert):
        raise Invalid("TLS needs both --tls-cert and --tls-key; --tls-client-ca comes on top of them")
    access = Access(folder)
    access.export(validators, miner or (), Tls(tls_cert, tls_key, tls_client_ca) if tls_cert else None)
    _report(access, {"action": "export"}, bus, reload, as_json)


@app.command("add")
def add(folder: Folder, keys: Keys, bus: Broker = "", reload: PidFile = None, as_json: JsonFlag = False) -> None:
    """Admit miners: print the pass of each, to hand over to it. The broker need not be told, but of a key revoked before."""
    from connito.platform.access import Access

    access = Access.open(folder)
    again = set(keys) & set(access.accounts.revoked)
    passes = access.add(keys)
    document = {"action": "add", "keys": list(passes), "passes": passes, "readmitted": sorted(again)}
    _report(access, document, bus, reload, as_json)


@app.command("revoke")
def revoke(folder: Folder, keys: Keys, bus: Broker = "", reload: PidFile = None, as_json: JsonFlag = False) -> None:
    """Void miners' passes. The broker closes their connections as soon as it is told."""
    from connito.platform.access import Access

    access = Access.open(folder)
    _report(access, {"action": "revoke", "keys": access.revoke(keys)}, bus, reload, as_json)


@app.command("enlist")
def enlist(
    folder: Folder,
    organisation: Annotated[str, typer.Argument(help="The organisation's name; the first member makes it.")],
    key: Annotated[str, typer.Argument(help="The member's public key, as `connito miner init` prints one.")],
    duty: Annotated[
        str,
        typer.Option("--as", help="owner: also cancels its members' runs; submitter; reader: sees, submits nothing."),
    ] = "reader",
    max_runs: Annotated[
        int | None, typer.Option(help="Runs of the organisation that may be under way at once, from now on.")
    ] = None,
    bus: Broker = "",
    reload: PidFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key a member of an organisation, and print its pass. The roster goes to the services, which take it over."""
    from connito.platform.access import Access

    access = Access.open(folder)
    again = key in access.accounts.revoked
    token = access.enlist(organisation, key, duty, max_runs)
    document = {"action": "enlist", "organisation": organisation, "keys": [key], "duty": duty, "passes": {key: token}}
    _report(access, document | {"readmitted": [key] if again else []}, bus, reload, as_json)


@app.command("dismiss")
def dismiss(
    folder: Folder,
    key: Annotated[str, typer.Argument(help="The member's public key.")],
    bus: Broker = "",
    reload: PidFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Take a member out of its organisation and void its pass. Its runs go on; an owner may cancel them."""
    from connito.platform.access import Access

    access = Access.open(folder)
    _report(access, {"action": "dismiss", "organisation": access.dismiss(key), "keys": [key]}, bus, reload, as_json)


@app.command("acts")
def acts(folder: Folder, as_json: JsonFlag = False) -> None:
    """Show what was done with the folder, when and by whom, each signed by the operator's key. Exits with 6 where the record
    was changed; keep the newest hash elsewhere to notice that its end is gone.
    """
    from connito.platform.access import Access
    from connito.render import formats

    rows = Access.open(folder).acts.read()
    frame = ("act", "unix_ms", "user", "by", "previous", "hash")
    cells = [
        (formats.moment(row["unix_ms"]), row["user"], row["act"],
         ", ".join(f"{name} {_plain(value)}" for name, value in row.items() if name not in frame and value not in (None, [])),
         row["hash"][:16]) for row in rows
    ]  # fmt: skip
    emit(as_json, {"acts": rows}, lambda: table(("when", "user", "act", "of", "hash"), cells, "nothing yet"))


def _plain(value: object) -> str:
    """Return lists and maps as people write them."""
    if isinstance(value, dict):
        return " ".join(f"{name}={_plain(one)}" for name, one in value.items())
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)


@app.command("rotate")
def rotate(
    folder: Folder,
    name: Annotated[
        str,
        typer.Argument(
            help="coordinator, validator-2, …: as `connito access list` shows them; miners: what admits them."
        ),
    ],
    finish: Annotated[
        bool, typer.Option("--finish", help="The new key is in use everywhere: retire the old one.")
    ] = False,
    bus: Broker = "",
    reload: PidFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Replace a key in two steps, between which both are valid. Messages of the old key stay valid."""
    from connito.platform.access import Access

    access = Access.open(folder)
    if name == "miners":
        renewed = access.renew_passes()
        _report(access, {"action": "renew", "keys": list(renewed), "passes": renewed}, bus, reload, as_json)
        return
    member = access.finish(name) if finish else access.rotate(name)
    document = {"action": "rotate", "name": name, "key": member.key, "previous": member.previous, "finished": finish}
    _report(access, document, bus, reload, as_json)


@app.command("lend")
def lend(
    run: Annotated[str, typer.Argument(help="The run whose hold-outs are sealed; library: experts that no run made.")],
    key: Annotated[
        str, typer.Argument(help="The public key of a validator, or service, that was admitted after the run began.")
    ],
    out: Annotated[
        Path, typer.Argument(help="The file to write, or to add to. The holder of the key reads it by CONNITO_LENT.")
    ],
    role: Annotated[
        str, typer.Option(help="Whose key opens them here: the customer's or the operator's.")
    ] = "operator",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a validator read the sealed hold-outs of a run that goes on: it judges from the next cycle. A service whose key was
    replaced reads by it what a run that is not public made, and private compositions."""
    import json

    from connito.client.lending import boxes
    from connito.errors import Invalid
    from connito.files import write_durably
    from connito.platform.session import Session
    from connito.wire.sealing import parse_boxes

    there = parse_boxes(out.read_bytes(), str(out)) if out.exists() else {}
    if there.get("reader", key) != key:
        raise Invalid(
            f"{out} opens for {there['reader']} what is in it; write what another key is lent to another file"
        )
    found = boxes(Session.open(data_dir, role=role), run, key)
    write_durably(out, json.dumps({**there, **found, "reader": key}, sort_keys=True).encode(), 0o600)
    document = {"run": run, "validator": key, "hold_outs": sorted(found), "file": str(out)}
    emit(
        as_json, document, lambda: f"{out} opens {len(found)} sealed files for that key alone: give it to who holds it"
    )


@app.command("list")
def list_(folder: Folder, as_json: JsonFlag = False) -> None:
    """Show the holder of each key, and rotated keys."""
    from connito.platform.access import Access

    access = Access.open(folder)
    rows = [{"name": m.name, "role": m.role, "key": m.key, "previous": m.previous} for m in access.members()]
    rows += [{"name": "", "role": "miner", "key": key, "previous": ""} for key in access.miners]
    roster = access.roster()
    rows += [
        {"name": name, "role": roster.duty(name, key), "key": key, "previous": ""}
        for name, members in sorted(roster.organisations.items())
        for key in sorted(members)
    ]
    retired = {key: {"role": role, "until_unix_ms": at} for key, (role, at) in access.roster().retired.items()}
    headers = ("name", "role", "key", "previous")
    emit(
        as_json,
        {"keys": rows, "retired": retired},
        lambda: "\n".join(
            [
                table(headers, [[row[h] for h in headers] for row in rows]),
                *(f"retired  {row['role']}  {key}" for key, row in retired.items()),
            ]
        ),
    )


def _report(access: Access, document: dict[str, Any], bus: str, pid_file: Path | None, as_json: bool) -> None:
    document |= {"folder": str(access.folder), "members": len(access.members()), "miners": len(access.miners)}
    document["told"] = _tell(access, bus or access.broker) if _concerns_broker(document) else False
    document["reloaded"] = _reload(pid_file)
    emit(as_json, document, lambda: "\n".join(_next_steps(access, document)))


def _concerns_broker(document: dict[str, Any]) -> bool:
    """Return whether what was done has to reach a broker that runs: new keys of miners need not."""
    action = document["action"]
    return bool(document["readmitted"] if action in ("add", "enlist") else action != "rotate" or document["finished"])


def _tell(access: Access, url: str) -> bool:
    if url:
        from connito.wire.tls import Tls

        asyncio.run(access.accounts.push(url, Tls.from_environment(os.environ)))
    return bool(url)


def _reload(pid_file: Path | None) -> bool:
    """Send the server SIGHUP. Raises `Retry` when it is not there."""
    if pid_file is None:
        return False
    from connito.errors import Retry

    try:
        os.kill(int(pid_file.read_text()), signal.SIGHUP)
    except (OSError, ValueError) as error:
        raise Retry(
            f"the files are written, but the nats-server of {pid_file} cannot be told ({error}); send it SIGHUP yourself"
        ) from error
    return True


def _next_steps(access: Access, document: dict[str, Any]) -> list[str]:
    folder, action = access.folder, document["action"]
    lines = [
        f"{formats.count(document['members'], 'key')} and {formats.count(document['miners'], 'admitted miner')} in {folder}"
    ]
    if action in ("enlist", "dismiss"):
        lines.append(f"give everybody {folder}/roster.json; services take it over by themselves")
    if action in ("add", "renew", "enlist"):
        for key, text in document["passes"].items():
            lines += [f"{key} joins with", f"  connito miner join {text}"]
    if action == "rotate" and not document["finished"]:
        lines += [
            f"{document['name']}: {document['key']} beside {document['previous']}",
            f"1. give everybody {folder}/roster.json; services take it over by themselves",
            f"2. give the service keys/{document['name']}.nk and restart its replicas one by one",
            f"3. connito access rotate {folder} {document['name']} --finish, and step 1 once more",
        ]
    if _concerns_broker(document) and not document["told"]:
        lines.append("a broker that runs has to be told: the same command with --bus nats://HOST:PORT")
    return lines
