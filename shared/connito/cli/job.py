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
    file: Annotated[Path, typer.Argument(help="The job: job.yaml, or YAML with the fields of RunSpec.")],
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job. What is left out takes its default; what cannot be is refused, naming the field."""
    from connito.client import Client
    from connito.jobs.spec import is_job, read_yaml

    if is_job(read_yaml(file)):
        document = _submit_job(file, data_dir, quiet=as_json)
    else:
        spec = read_spec(file)
        with Client.local(data_dir) as client:
            document = {"run": client.create_run(spec)}
    run = document["run"]
    emit(as_json, document, lambda: f"run {run} is created; follow it with `connito job watch {run}`")


def _submit_job(file: Path, data_dir: Path | None, *, quiet: bool) -> dict[str, Any]:
    """Check, upload, create."""
    from connito.cli.job_desk import findings_text, progress
    from connito.client import Client
    from connito.jobs.check import check_file
    from connito.jobs.findings import require
    from connito.jobs.submit import submit as send

    with progress(quiet=quiet) as tell:
        checked = check_file(file, data_dir, tell)
        require(checked.findings, str(file))
        with Client.local(data_dir) as client:
            done = send(checked, client.create_run, tell)
    warnings = [finding for finding in checked.findings if finding.level == "warning"]
    if warnings and not quiet:
        typer.echo(findings_text(warnings), err=True)
    return {**done.to_json(), "warnings": [finding.to_json() for finding in warnings]}


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
    from google.protobuf.json_format import ParseDict, ParseError

    from connito.errors import Invalid
    from connito.jobs.spec import read_yaml
    from connito.v1.run_pb2 import RunSpec

    try:
        return ParseDict(read_yaml(file), RunSpec())
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
