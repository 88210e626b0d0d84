"""`connito evaluate`: tasks for an expert or an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.library.options import (
    AcceptOption,
    AsOption,
    OrganisationOption,
    ShelfOption,
    agreement,
    base_option,
    holdings,
    named_files,
)
from connito.cli.output import DataDirOption, DeviceOption, JsonFlag, emit, table, told


@told
def evaluate(
    target: Annotated[str, typer.Argument(help="Expert id or folder, or folder of an exported model.")],
    base: Annotated[Path | None, base_option("The base of an expert; it is scored beside it.")] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option(help="Task file of lm-evaluation-harness (YAML); may be repeated.")
    ] = None,
    cloze: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: make a cloze task of held-out text; may be repeated.")
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Training text that items may not come from; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Items of a task; 0 for all.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Score an expert or a model on local or generated tasks, beside its base, with contaminated items counted apart."""
    from dataclasses import asdict

    from connito.curation.evaluating import EvaluateOptions, write_scores
    from connito.curation.evaluating import evaluate as run

    options = EvaluateOptions(tasks or (), named_files(cloze), against or (), limit, agreement(accept_license))
    scores = run(target, base, options, holdings(shelf, data_dir, who, organisation))
    if out is not None:
        write_scores(scores, target, out)
    rows = [
        (score.task, score.metric, score.items, _number(score.base), _number(score.score),
         "–" if score.interval is None else f"{score.interval[0]:+.4f} to {score.interval[1]:+.4f}",
         score.contaminated, _number(score.clean_score))
        for score in scores
    ]  # fmt: skip
    head = ("task", "metric", "items", "base", "score", "change (95 %)", "seen", "score unseen")
    emit(as_json, {"target": target, "scores": [asdict(score) for score in scores]}, lambda: table(head, rows))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
