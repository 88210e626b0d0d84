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
    as_json: JsonFlag = False,
) -> None:
    """Recompute selection, scores, consensus, rewards and every outer step of a run from the log and the store.

    Exits with 6 where anything differs, after naming the first divergence.
    """
    from connito.audit.runs import AuditOptions
    from connito.audit.runs import audit as recompute

    say = silent if as_json else tell
    options = AuditOptions(folder, data_dir, not no_model, threads, tolerance, say)
    evidence, audited = recompute(run, options, _chain_of(against))
    document = audited.to_json()
    emit(as_json, document, lambda: _text(document, evidence))
    settle(document["differences"], f"run {run}")


def settle(differences: list[dict[str, Any]], what: str) -> None:
    """Raise `VerificationFailed` naming the first difference, if there is one."""
    from connito.errors import VerificationFailed

    if differences:
        first = differences[0]
        more = f" ({len(differences) - 1} more)" if len(differences) > 1 else ""
        raise VerificationFailed(
            f"{what} differs, here: {first['where']}: {first['what']}{more}; "
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


def _text(document: dict[str, Any], evidence: Evidence) -> str:
    rows = [
        (row["cycle"] or "", row["check"], row["compared"], row["differences"] or "", row["note"])
        for row in document["checks"]
    ]
    lines = [table(("cycle", "check", "compared", "differ", "note"), rows), ""]
    lines += [f"log {document['chain']['head']} over {document['messages']} messages"]
    lines += [f"  {difference['where']}: {difference['what']}" for difference in document["differences"]]
    same = document["result"] == "same"
    model = "" if document["model"] else " (selection and losses left out)"
    lines.append(f"{evidence.run}: {'same' if same else 'differs'}{model}, {formats.duration(document['seconds'])}")
    return "\n".join(lines)


def tell(text: str) -> None:
    typer.echo(f"  {text}", err=True)
