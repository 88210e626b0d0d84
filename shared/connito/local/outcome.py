"""Write what `connito up` leaves of a run (report.json, loss.svg, proof.md with proof.svg), and say how it ended."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from connito.errors import Fatal, Invalid, Retry
from connito.files import write_durably
from connito.local.defaults import UpOptions
from connito.platform.datadir import DataDir
from connito.protocol.progress import merged_anything
from connito.render import formats

if TYPE_CHECKING:
    from pathlib import Path

    from connito.local.installation import Installation
    from connito.local.materials import Materials
    from connito.wire.facts import RunFacts


def summary(report: dict[str, Any], options: UpOptions) -> str:
    """Return the summary of a run for the terminal: losses, costs and files."""
    data, totals = DataDir.at(options.data_dir), report["totals"]
    first, last = totals["target_loss_first"], totals["target_loss_last"]
    lines = [f"\n{report['run']}: {report['outcome']['status']} after {formats.count(len(report['cycles']), 'cycle')}"]
    if first is not None:
        general = totals["general_loss_last"] - totals["general_loss_first"]
        lines.append(f"  {report['domain']} loss   {first:.4f} → {last:.4f} nats per token ({last - first:+.4f})")
        lines.append(f"  general loss   {general:+.4f}")
    for row in report["proof"] or ():
        if row["use"] == "target":
            before, after = formats.percent(row["before"]), formats.percent(row["after"])
            points = f"{100 * row['change']:+.1f} points, {100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
            lines.append(f"  {row['what']}: {before} → {after} right ({points}; {row['count']} of held-out text)")
    if totals["upload_share_of_model"]:
        upload, share = totals["upload_bytes_per_miner_and_cycle"], totals["upload_share_of_model"]
        lines.append(
            f"  upload         {formats.size(upload)} a miner and cycle, {formats.percent(share)} of the model"
        )
    if report["library"]:
        lines.append(f"  expert         {report['library']['expert_id']}")
    lines.append(
        f"  time, memory   {formats.duration(totals['seconds']['total'])}, at most {formats.size(totals['peak_memory_bytes'])}"
    )
    for name in ("report.json", "loss.svg", "proof.md", "logs"):
        if (data.root / name).exists():
            lines.append(f"  {data.root / name}")
    return "\n".join([*lines, *_next(report, data)])


def _next(report: Mapping[str, Any], data: DataDir) -> list[str]:
    """Return commands to try next; they need nothing that runs."""
    where = "" if data.root == DataDir.at(None).root else f" --data-dir {shlex.quote(str(data.root))}"
    commands = {f"connito job report {report['run']}{where}": "before and after, measured again, with intervals"}
    if report["library"] is not None:
        expert = report["library"]["expert_id"]
        commands = {
            f"connito library show {expert}{where}": "its card",
            f"connito library export {expert}{where} --out expert": "the expert as files, to use and to check",
            **commands,
        }
    width = max(map(len, commands))
    return [
        "\nnothing has to run for these:",
        *(f"  {command:<{width}}   {what}" for command, what in commands.items()),
    ]


def check_outcome(report: dict[str, Any], logs: Path) -> None:
    """Raise the error of a run that did not complete: `Retry` when participants or the store were missing,
    `Invalid` when the job itself cannot be done, `Fatal` otherwise."""
    outcome = report["outcome"]
    if outcome["status"] == "completed":
        return
    text = f"run {report['run']} {outcome['status']}: {outcome['reason']} ({outcome['detail']}); logs are in {logs}"
    if outcome["reason"] in ("too-few-miners", "no-quorum", "store-unavailable"):
        raise Retry(text)
    if outcome["reason"] in ("bad-spec", "selection-failed") or outcome["status"] == "no-improvement":
        raise Invalid(text)
    raise Fatal(text)


async def measure_proof(installation: Installation, facts: RunFacts, materials: Materials) -> dict[str, Any] | None:
    """Measure what base and result get right of held-out text, and let both write; None where nothing was merged."""
    from connito.local.materials import run_task

    version = facts.version(facts.cycle)
    if version is None or not merged_anything(facts) or facts.selection is None or facts.spec is None:
        return None
    state, held = await installation.store.fetch(version.state), (facts.spec.holdout, *facts.spec.general_holdouts)
    params = {
        "folder": str(materials.folder),
        "state": str(state),
        "layers": {str(layer.layer): list(layer.experts) for layer in facts.selection.layers},
        "holdouts": {ref.domain: str(materials.corpus(ref.domain, "holdout")) for ref in held},
        "target": facts.spec.domain,
    }
    return await run_task(installation, "proof", params, installation.display.progress)


def write_report(
    data: DataDir,
    options: UpOptions,
    facts: RunFacts,
    proof: dict[str, Any] | None,
    materials: Materials,
    totals: Mapping[str, Any],
) -> dict[str, Any]:
    """Write report.json, also where `--report` says, loss.svg, proof.md and proof.svg; return the report."""
    from connito.local.proof import markdown
    from connito.views.loss_plot import loss_svg
    from connito.views.proof_plot import Row, proof_svg
    from connito.views.run_report import run_report

    report = run_report(facts, model_bytes=materials.manifest.size, totals=totals)
    report["proof"] = None if proof is None else proof["rows"]
    for path in (data.report, options.report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(report, indent=2) + "\n")
    write_durably(data.root / "loss.svg", loss_svg(report))
    if proof is not None:
        write_durably(data.root / "proof.md", markdown(report, proof))
        write_durably(data.root / "proof.svg", proof_svg(report["run"], [Row(**row) for row in proof["rows"]]))
    return report
