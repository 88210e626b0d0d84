"""`connito audit`: recompute a run from its log and its artifacts, and name the first divergence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.render import formats
from connito.runtime.progress import silent

if TYPE_CHECKING:
    from connito.audit.evidence import Evidence

FromOption = Annotated[
    Path | None,
    typer.Option("--from", help="Folder that an ended `connito up` left, whose servers are started, or an archive."),
]
NoModelFlag = Annotated[
    bool,
    typer.Option(
        "--no-model", help="Leave out what needs the model: the selection, and losses. Merges are recomputed anyway."
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=0,
        help="Threads for the model, 0 for all cores; equal bits need as many as the run had, which is the default "
        "where `connito up` ran it.",
        show_default=False,
    ),
]
ToleranceOption = Annotated[
    float,
    typer.Option("--tolerance", help="Nats per token by which recomputed losses may differ; 0 for equal bits."),
]


def audit(
    run: Annotated[str, typer.Argument(help="The run's id, as `connito job list` shows it.")],
    folder: FromOption = None,
    data_dir: DataDirOption = None,
    no_model: NoModelFlag = False,
    threads: ThreadsOption = None,
    tolerance: ToleranceOption = 1e-4,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Output of another auditor's `connito audit --json`, to compare the logs."),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", help="A checkpoint that a witness cosigned; the log has to be the one it saw."),
    ] = None,
    receipt: Annotated[
        list[Path] | None,
        typer.Option(
            "--receipt", help="A receipt that a miner kept; the log has to hold what it is for, and the answer."
        ),
    ] = None,
    log_only: Annotated[
        bool,
        typer.Option(
            "--log-only",
            help="Check what the log shows, without the store: any key that may read is enough, a miner's too.",
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Recompute selection, scores, consensus, rewards and every outer step of a run from the log and the store.

    Names the first divergence, and who is to blame: exits with 6 for the operator, 7 for validators, 8 for miners alone, and 0
    where nobody is.
    """
    from connito.audit.runs import AuditOptions
    from connito.audit.runs import audit as recompute

    say = silent if as_json else tell
    notes = {str(path): _read(path) for path in [*(checkpoint or ()), *(receipt or ())]}
    options = AuditOptions(folder, data_dir, not (no_model or log_only), threads, tolerance, say, notes, not log_only)
    evidence, audited = recompute(run, options, _chain_of(against))
    document = audited.to_json()
    emit(as_json, document, lambda: _text(document, evidence))
    settle(document["differences"], f"run {run}")


def settle(differences: list[dict[str, Any]], what: str) -> None:
    """Raise the error of those who are to blame, naming the first difference of theirs; none for what nobody is to blame for."""
    from connito.errors import MinerAtFault, ValidatorAtFault, VerificationFailed

    for role, error in (("operator", VerificationFailed), ("validator", ValidatorAtFault), ("miner", MinerAtFault)):
        theirs = [difference for difference in differences if difference["by"].split()[0] == role]
        if theirs:
            first = theirs[0]
            more = f" ({len(differences) - 1} more)" if len(differences) > 1 else ""
            raise error(
                f"{what} differs, here: {first['where']}: {first['what']}{more}; to blame: {first['by']}; "
                "compare with another copy of the log and the store to see which one was changed"
            )


def _chain_of(path: Path | None) -> dict[str, str]:
    from connito.data.documents import parse_json
    from connito.errors import Invalid

    if path is None:
        return {}
    try:
        windows: dict[str, str] = parse_json(path.read_text())["chain"]["windows"]
        return {str(window): str(value) for window, value in windows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Invalid(f"{path} is not what `connito audit --json` prints: {error!r}") from error


def _read(path: Path) -> str:
    from connito.errors import Invalid

    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise Invalid(f"cannot read {path}: {error}; give a file that `connito witness` or a miner has kept") from error


def _text(document: dict[str, Any], evidence: Evidence) -> str:
    rows = [
        (row["cycle"] or "", row["check"], row["compared"], row["differences"] or "", row["note"])
        for row in document["checks"]
    ]
    lines = [table(("cycle", "check", "compared", "differ", "note"), rows), ""]
    lines += [f"log {document['chain']['head']} over {formats.count(document['messages'], 'message')}"]
    lines += [
        f"  {difference['where']}: {difference['what']} ({difference['by']})" for difference in document["differences"]
    ]
    same = document["result"] == "same"
    lines += [f"to blame: {', '.join(document['blame'])}"] if document["blame"] else []
    model = (
        "" if document["model"] else " (selection and losses left out)" if document["files"] else " (by the log alone)"
    )
    lines.append(f"{evidence.run}: {'same' if same else 'differs'}{model}, {formats.duration(document['seconds'])}")
    return "\n".join(lines)


def tell(text: str) -> None:
    typer.echo(f"  {text}", err=True)
