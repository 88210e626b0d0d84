"""`connito job`: a customer's adaptation jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, DeviceOption, JsonFlag, emit, progress, table
from connito.render.formats import count, moment
from connito.wire.enums import plain_name

if TYPE_CHECKING:
    from connito.v1.services_pb2 import RunStatus

app = typer.Typer(no_args_is_help=True, help="Submit, list, show, watch and cancel adaptation jobs.")
Run = Annotated[str, typer.Argument(help="The run's id.")]
File = Annotated[Path, typer.Argument(help="The job: job.yaml.")]
Profile = Annotated[str, typer.Option(help="Policies to start from: platform, laptop or tiny; replaces the file's.")]


@app.command("submit")
def submit(
    file: Annotated[Path, typer.Argument(help="The job: job.yaml, or YAML with the fields of RunSpec.")],
    profile: Profile = "",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job. Missing fields take their defaults; invalid ones are refused by name."""
    from connito.client import Client
    from connito.jobs.findings import listed
    from connito.jobs.submit import prepare

    with progress(quiet=as_json) as tell:
        job = prepare(file, data_dir, tell, profile=profile)
        with Client.local(data_dir) as client:
            done = client.job.submit(job, progress=tell)
    if done.warnings and not as_json:
        typer.echo(listed(done.warnings), err=True)
    emit(as_json, done.to_json(), lambda: f"run {done.run} is created; follow it with `connito job watch {done.run}`")


@app.command("list")
def list_(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """List the runs, also of a platform that was stopped."""
    from connito.client.runs import statuses

    rows = [_row(status) for status in statuses(data_dir)]
    headers = ("run", "domain", "phase", "cycle", "cycles", "version")
    emit(as_json, {"runs": rows}, lambda: table(headers, [[row[h] for h in headers] for row in rows], "no runs yet"))


@app.command("show")
def show(run: Run, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Show the status of one run, also of a platform that was stopped."""
    from connito.client.runs import statuses

    (row,) = map(_row, statuses(data_dir, run))
    emit(as_json, row, lambda: "\n".join(f"{name:<20} {value}" for name, value in _told(row) if value))


@app.command("watch")
def watch(run: Run, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Follow a run until it ends. The exit code is 0 only where an expert came out of it."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        seen = [_row(status) for status in _printed(client.job.watch(run), quiet=as_json)]
    if as_json:
        typer.echo(json.dumps(seen[-1] if seen else {}, indent=2))
    elif seen:
        typer.echo(f"{run}: its miners were given {seen[-1]['text']}")
    _settle(seen[-1] if seen else {})


def _settle(last: dict[str, Any]) -> None:
    """Raise what a run ended with that delivered nothing."""
    from connito.errors import Fatal, Invalid

    phase = last.get("phase")
    if phase in ("no-improvement", "failed", "cancelled"):
        text = f"run {last['run']} ended without an expert, {phase}: {last['detail']}"
        raise Invalid(text) if phase == "no-improvement" else Fatal(text)


@app.command("cancel")
def cancel(
    run: Run,
    why: Annotated[str, typer.Option(help="Reason for the run's log.")] = "cancelled by the customer",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """End a run early. Its published versions stay."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        client.job.cancel(run, why)
    emit(as_json, {"cancelled": run}, lambda: f"run {run} is cancelled")


@app.command("check")
def check(file: File, profile: Profile = "", data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Check a job before anything is spent: policies, text, duplicates, contamination, tokenizer, sizes, licence, budget."""
    from connito.jobs.check import check_file
    from connito.jobs.findings import require

    with progress(quiet=as_json) as tell:
        checked = check_file(file, data_dir, tell, profile=profile)
    emit(as_json, checked.to_json(), lambda: repr(checked))
    require(checked.findings, str(file), shown=not as_json)


@app.command("quote")
def quote(
    file: File,
    pilot: Annotated[
        bool, typer.Option("--pilot/--no-pilot", help="Make one cycle's local steps here and measure them.")
    ] = True,
    profile: Profile = "",
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Estimate a job's experts, upload, memory, cycles and time. Loads the base."""
    from connito.jobs.check import check_file
    from connito.jobs.findings import require
    from connito.jobs.quote import quote as price

    with progress(quiet=as_json) as tell:
        made = price(check_file(file, data_dir, tell, profile=profile), pilot=pilot, progress=tell)
    emit(as_json, made.to_json(), lambda: repr(made))
    require(made.findings, str(file), shown=not as_json)


@app.command("report")
def report(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    out: Annotated[Path | None, typer.Option(help="Write report, plot and expert into this folder.")] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="With --out: the base as well.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure base and result here, with intervals.")
    ] = True,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Write the delivery report of an ended run: gain, changes, contributors and use of the expert."""
    from connito.jobs.delivery import deliver
    from connito.jobs.pages import markdown
    from connito.platform.session import Session

    with progress(quiet=as_json) as tell:
        session = Session.open(data_dir, role="customer", wake=True)
        done = deliver(session, run, out, with_base=with_base, measure=measure, progress=tell)
    emit(as_json, done.document, lambda: "\n".join([markdown(done.document), *map(str, done.written)]))


def _printed(updates: Iterator[RunStatus], *, quiet: bool) -> Iterator[RunStatus]:
    """Say of each version what it changed, and where the run stands; between two windows nothing is said twice."""
    last = ["", ""]
    for status in updates:
        for place, line in enumerate(() if quiet else (_published(status), _stands(status))):
            if not last[place].startswith(line):
                typer.echo(f"{status.spec.run}: {line}")
                last[place] = line
        yield status


def _published(status: RunStatus) -> str:
    """Return what the newest version changed on held-out text, its domain first; empty for the base."""
    if not status.losses:
        return ""
    target, *others = status.losses
    beside = f", general {mean(loss.after - loss.before for loss in others):+.4f}" if others else ""
    merged = count(len(status.merged), "miner") if status.merged else "nobody"
    loss = f"{target.domain} loss {target.before:.4f} → {target.after:.4f} nats per token{beside}"
    return f"version {status.version}: {loss}; merged from {merged}"


def _stands(status: RunStatus) -> str:
    from connito.v1.services_pb2 import RunPhase

    where = f"cycle {status.cycle} of {status.spec.cycles}, {status.window}" if status.window else status.detail
    return f"{plain_name(RunPhase, status.phase)}; {where}"


def _row(status: RunStatus) -> dict[str, Any]:
    from connito.v1.services_pb2 import RunPhase
    from connito.views.coverage import planned

    read = planned(status.spec, len(status.miners), status.cycle)
    return {
        "run": status.spec.run,
        "domain": status.spec.domain,
        "base": status.spec.base.name,
        "phase": plain_name(RunPhase, status.phase),
        "cycle": status.cycle,
        "cycles": status.spec.cycles,
        "window": status.window,
        "deadline_unix_ms": status.deadline_unix_ms,
        "version": status.version,
        "miners": list(status.miners),
        "validators": list(status.validators),
        "detail": status.detail,
        "text": str(read),
    }


def _told(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the names and values of a run's status for people; what there is nothing to say of is empty."""
    for key, value in row.items():
        if key == "deadline_unix_ms":
            yield "window closes", f"{moment(value)} at the latest" if value else ""
        else:
            text = ", ".join(value) if isinstance(value, list) else str(value)
            yield "given to its miners" if key == "text" else key, text
