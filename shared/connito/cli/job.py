"""`connito job`: a customer's adaptation jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.v1.services_pb2 import RunStatus

app = typer.Typer(no_args_is_help=True, help="Submit, list, show, watch and cancel adaptation jobs.")
Run = Annotated[str, typer.Argument(help="The run's id.")]


@app.command("submit")
def submit(
    file: Annotated[Path, typer.Argument(help="The job, YAML: the fields of RunSpec.")],
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job. What is left out takes its default; what cannot be is refused, naming the field."""
    from connito.client import Client

    spec = read_spec(file)
    with Client.local(data_dir) as client:
        run = client.create_run(spec)
    emit(as_json, {"run": run}, lambda: f"run {run} is created; follow it with `connito job watch {run}`")


@app.command("list")
def list_(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """List the runs."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        rows = [_row(status) for status in client.runs()]
    headers = ("run", "domain", "phase", "cycle", "cycles", "version")
    emit(as_json, {"runs": rows}, lambda: table(headers, [[row[h] for h in headers] for row in rows], "no runs yet"))


@app.command("show")
def show(run: Run, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Show where one run stands."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        row = _row(client.get(run))
    emit(as_json, row, lambda: "\n".join(f"{key:<11} {_plain(value)}" for key, value in row.items()))


@app.command("watch")
def watch(run: Run, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Follow a run until it ends."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        seen = [_row(status) for status in _told(client.watch(run), quiet=as_json)]
    if as_json:
        typer.echo(json.dumps(seen[-1] if seen else {}, indent=2))


@app.command("cancel")
def cancel(
    run: Run,
    why: Annotated[str, typer.Option(help="What the run's log says about it.")] = "cancelled by the customer",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """End a run early. Versions that it has published stay."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        client.cancel(run, why)
    emit(as_json, {"cancelled": run}, lambda: f"run {run} is cancelled")


def read_spec(file: Path) -> Any:
    """A RunSpec from YAML. Raises `NotFound` for a missing file, `Invalid` for a field that does not exist."""
    import yaml
    from google.protobuf.json_format import ParseDict, ParseError

    from connito.errors import Invalid, NotFound
    from connito.v1.run_pb2 import RunSpec

    try:
        content = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {file}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Invalid(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise Invalid(f"{file} holds no mapping; write one `field: value` a line, as in the reference of RunSpec")
    try:
        return ParseDict(content, RunSpec())
    except ParseError as error:
        raise Invalid(f"{file}: {error}; the reference of RunSpec lists the fields") from error


def _told(updates: Iterator[RunStatus], *, quiet: bool) -> Iterator[RunStatus]:
    for status in updates:
        if not quiet:
            row = _row(status)
            where = f"cycle {row['cycle']} of {row['cycles']}, {row['window']}" if row["window"] else row["detail"]
            typer.echo(f"{row['run']}: {row['phase']}; {where}")
        yield status


def _row(status: RunStatus) -> dict[str, Any]:
    from connito.v1.services_pb2 import RunPhase

    return {
        "run": status.spec.run,
        "domain": status.spec.domain,
        "base": status.spec.base.name,
        "phase": RunPhase.Name(status.phase).removeprefix("RUN_PHASE_").lower(),
        "cycle": status.cycle,
        "cycles": status.spec.cycles,
        "window": status.window,
        "deadline_unix_ms": status.deadline_unix_ms,
        "version": status.version,
        "miners": list(status.miners),
        "validators": list(status.validators),
        "detail": status.detail,
    }


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
