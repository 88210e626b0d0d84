"""`connito explain`: a submission's receipt, recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.audit import FromOption, NoModelFlag, ThreadsOption, ToleranceOption, settle, tell
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats
from connito.runtime.progress import silent
from connito.wire.identity import short_key

if TYPE_CHECKING:
    from connito.audit.evidence import Evidence


def explain(
    submission: Annotated[str, typer.Argument(help="<run>/<cycle>/<miner>: the miner by label or by public key.")],
    folder: FromOption = None,
    data_dir: DataDirOption = None,
    no_model: NoModelFlag = False,
    log_only: Annotated[
        bool, typer.Option("--log-only", help="Only what the log itself says: needs no store, and no key to it.")
    ] = False,
    threads: ThreadsOption = None,
    tolerance: ToleranceOption = 1e-4,
    as_json: JsonFlag = False,
) -> None:
    """Show the inputs of a submission's result, recompute it from public artifacts, and print same or the first difference.

    Exits as `connito audit` does where anything differs.
    """
    from connito.audit.runs import AuditOptions
    from connito.audit.runs import explain as recompute

    say = silent if as_json else tell
    options = AuditOptions(folder, data_dir, not (no_model or log_only), threads, tolerance, say, files=not log_only)
    evidence, explained = recompute(submission, options)
    document = explained.to_json()
    emit(as_json, document, lambda: _text(document, evidence))
    settle(document["differences"], f"submission {submission}")


def _text(document: dict[str, Any], evidence: Evidence) -> str:
    """Return the explanation as text: the result first, then its inputs."""
    lines = [f"{document['label']} in cycle {document['cycle']} of {document['run']}", f"  {document['miner']}", ""]
    if document["origin_cycle"] != document["cycle"]:
        lines.append(f"late work of cycle {document['origin_cycle']}")
    lines += _inputs(document["inputs"])
    if document["draw"] is not None:
        drawn = len(document["draw"]["validators"])
        lines.append(f"seed        {document['draw']['seed']} from {formats.count(drawn, 'validator')}")
        if len(document["draw"]["assigned"]) < drawn:
            lines.append(f"assigned    {', '.join(map(short_key, document['draw']['assigned']))}")
    lines += [line for report in document["reports"] for line in _report(report)]
    lines += [line for row in document["validators"] for line in _standing(row)]
    lines += [f"refused     {row['reason']} ({row['window']}): {row['detail']}" for row in document["refusals"]]
    lines += _verdict(document["verdict"])
    lines += ["", "signed by"]
    lines += [
        f"  {row['stream']:<8} {row['sequence']:>5}  {short_key(row['signer'])}  {row['message']}"
        for row in document["signatures"]
    ]
    lines += ["", *(f"  {step['check']}: {step['note']}" for step in document["checks"] if step["note"])]
    lines += [f"  {difference['where']}: {difference['what']}" for difference in document["differences"]]
    compared = sum(step["compared"] for step in document["checks"])
    same = document["result"] == "same"
    lines.append(
        f"recomputed: {'same' if same else 'differs'} ({formats.count(compared, 'comparison')}, {evidence.run})"
    )
    return "\n".join(lines)


def _inputs(inputs: dict[str, Any] | None) -> list[str]:
    if inputs is None:
        return ["nothing of it was scored in this cycle"]
    return [
        f"artifact    {inputs['artifact']['digest']} ({inputs['artifact']['bytes']} bytes)",
        f"base state  {inputs['base_state']['digest']}",
        f"commitment  {inputs['commitment']} (INGRESS {inputs['commit_sequence']})",
        f"reveal      INGRESS {inputs['reveal_sequence']}",
    ]


def _report(report: dict[str, Any]) -> list[str]:
    why = f"{report['reason']}: {report['detail']}" if report["reason"] else report["detail"]
    lines = [f"score       {short_key(report['validator'])}  utility {report['utility']:.5f}  {why}"]
    batches: dict[str, list[int]] = {}
    for loss in report["losses"]:
        batches.setdefault(loss["domain"], []).append(loss["sequence"])
    if batches:
        sizes = ", ".join(f"{len(numbers)} of {domain}" for domain, numbers in batches.items())
        decided = ", where the race was decided" if report["evaluated_sequences"] else ""
        lines.append(f"            on {sizes}{decided}")
    return lines


def _standing(row: dict[str, Any]) -> list[str]:
    """Return a validator's weight and trust after the cycle; nothing where trust does not change."""
    if row["trust"] is None or row["idle"]:
        return []
    why = f"  {row['reason']}: {row['detail']}" if row["reason"] else ""
    said = f"weight {row['weight']:.3f}, agrees to {formats.percent(row['agreement'])}, trust now {row['trust']:.3f}"
    return [f"validator   {short_key(row['validator'])}  {said}{why}"]


def _verdict(verdict: dict[str, Any] | None) -> list[str]:
    from connito.views.standings import rating_text

    if verdict is None:
        return ["verdict     none in this cycle"]
    why = f"  {verdict['reason']}: {verdict['detail']}" if verdict["reason"] else ""
    rank = f"rank {verdict['rank']}, " if verdict["rank"] else ""
    withheld = f" ({verdict['withheld']} withheld)" if verdict["withheld"] else ""
    share = f"reward {verdict['reward']}{withheld}, share of the merge {verdict['weight']:.4f}"
    rating = rating_text(verdict["rating"])
    share += f", rating {rating}" if rating else ""
    return [f"verdict     {verdict['status']}, {rank}utility {verdict['utility']:.5f}, {share}{why}"]
