"""`connito job` for customers: check, quote and report of a job.yaml."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, size

if TYPE_CHECKING:
    from connito.jobs.findings import Finding
    from connito.jobs.quote import Quote

File = Annotated[Path, typer.Argument(help="The job: job.yaml.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to `connito job`."""
    for verb in (check, quote, report):
        app.command(verb.__name__)(verb)


def check(file: File, data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Check a job before anything is spent: text, duplicates, contamination, tokenizer, sizes, licence, budget."""
    from connito.jobs.check import check_file
    from connito.jobs.findings import require

    with progress(quiet=as_json) as tell:
        checked = check_file(file, data_dir, tell)
    emit(as_json, checked.to_json(), lambda: findings_text(checked.findings))
    require(checked.findings, str(file))


def quote(
    file: File,
    pilot: Annotated[
        bool, typer.Option("--pilot/--no-pilot", help="Make one cycle's local steps here and measure them.")
    ] = True,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what a job will take: experts, upload, memory, cycles, time. Loads the base."""
    from connito.jobs.check import check_file
    from connito.jobs.findings import require
    from connito.jobs.quote import quote as price

    with progress(quiet=as_json) as tell:
        made = price(check_file(file, data_dir, tell), pilot=pilot, progress=tell)
    emit(as_json, made.to_json(), lambda: _quote_text(made))
    require(made.findings, str(file))


def report(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    out: Annotated[Path | None, typer.Option(help="Write report, plot and expert into this folder.")] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="With --out: the base as well.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure base and result here, with intervals.")
    ] = True,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """The delivery report of a run that has ended: what it gained, what changed, who contributed, how to use it."""
    from connito.errors import Invalid
    from connito.jobs.delivery import deliver, write
    from connito.jobs.pages import markdown
    from connito.platform.session import Session

    if with_base and out is None:
        raise Invalid("--with-base needs a folder to write to: add --out DIR")
    with progress(quiet=as_json) as tell:
        delivered = deliver(Session.open(data_dir, role="customer"), run, measure=measure, progress=tell)
        written = [] if out is None else write(delivered, out, with_base=with_base)
    emit(as_json, delivered.document, lambda: "\n".join([markdown(delivered.document), *map(str, written)]))


def _quote_text(made: Quote) -> str:
    memory, chosen = made.memory, sum(map(len, made.layers.values()))
    lines = [
        f"{made.domain}: {chosen} of {made.total_experts} experts, in {len(made.layers)} layers",
        (
            f"  upload      {size(made.upload)} a miner and cycle ({made.upload / made.model:.1%} of the model), "
            f"{size(made.upload * made.cycles)} over {made.cycles} cycles"
        ),
        (
            f"  memory      {size(memory.total)} a miner: weights {size(memory.weights)}, training state "
            f"{size(memory.gradients + memory.moments)}, activations {size(memory.activations)}; and torch itself"
        ),
    ]
    if made.pilot is not None:
        pilot = made.pilot
        lines.append(
            f"  pilot       {pilot.steps} steps: {pilot.loss_before:.4f} → {pilot.loss_after:.4f} nats per token "
            f"(saved {pilot.gain:.4f}, {pilot.low:.4f} to {pilot.high:.4f})"
        )
    needed = f"about {made.cycles_needed} to the objective" if made.cycles_needed else "no estimate to an objective"
    lines.append(f"  cycles      at most {made.cycles}; {needed}")
    if made.seconds is not None:
        lines.append(f"  time        about {made.seconds:.3g} s for {made.cycles} cycles, from {made.seconds_from}")
    return "\n".join([*lines, findings_text(made.findings)]).rstrip()


def findings_text(findings: list[Finding]) -> str:
    """One line a finding, gravest last, so that it is what stays on the screen."""
    marks = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}
    lines = []
    for finding in sorted(findings, key=lambda finding: list(marks).index(finding.level)):
        lines.append(f"{marks[finding.level]}  {finding.check:<13} {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<23} → {finding.remedy}")
    return "\n".join(lines)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Says on stderr what is being done: in place on a terminal, a line each elsewhere, nothing where it is not wanted."""
    last = [""]

    def tell(what: str, share: float) -> None:
        if quiet or what == last[0]:
            return
        last[0] = what
        if sys.stderr.isatty():
            print(f"\r\033[K{100 * share:3.0f} %  {what}", end="", file=sys.stderr, flush=True)
        else:
            print(what, file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if last[0] and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
