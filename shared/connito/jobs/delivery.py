"""The delivery report of a run, with losses measured again on the customer's machine.

The log has sums of losses; intervals need the sequences. So the report fetches the base, the hold-outs and the states,
measures base and result on the report part of every hold-out and on the customer's own benchmarks, pairs them sequence by
sequence, and says how far its own figures are from the aggregator's. Needs torch, unless it is told not to measure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.manifest import Manifest
from connito.errors import Invalid, NotFound, Retry
from connito.jobs.context import JobContext
from connito.library.deposit_plan import Deposit as Due
from connito.library.deposit_plan import lacks_scores, plan
from connito.library.schema import ExpertRecord, read_record
from connito.library.scores import SCORING_SECONDS
from connito.protocol.holdout import subsets
from connito.protocol.scoring.proof_of_loss import paired
from connito.protocol.sequences import sequences
from connito.runtime.progress import Progress, silent
from connito.runtime.tasks import blocking
from connito.service.customer_store import CustomerStore
from connito.v1 import run_pb2
from connito.views.coverage import covered
from connito.views.empty_handed import shelf
from connito.views.run_report import run_report
from connito.wire.subjects import fact as fact_subject
from connito.workloads.benchmarks import LOSS, SEQUENCES

if TYPE_CHECKING:
    import numpy.typing as npt

    from connito.moe.evaluate import Evaluator
    from connito.platform.session import Session
    from connito.wire.fact import Record
    from connito.wire.facts import RunFacts

CONFIDENCE = 0.95
# How long a report waits for the expert of a run that has just ended, and between looks.
DEPOSIT_SECONDS, POLL_SECONDS = 60.0, 0.5


@dataclass(frozen=True)
class Delivered:
    """The report as data, and the deposited expert when there is one."""

    document: dict[str, Any]
    expert: Deposit | None
    context: JobContext
    written: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Deposit:
    """An expert of the library: record, file and, where there is one, attestation."""

    record: ExpertRecord
    expert: Path
    attestation: dict[str, Any] | None


def deliver(
    session: Session,
    run: str,
    out: Path | None = None,
    *,
    with_base: bool = False,
    measure: bool = True,
    progress: Progress = silent,
) -> Delivered:
    """Return the report of a run that has ended; with `out`, `write` it there.

    Raises `NotFound` for an unknown run, `Retry` for one that goes on.
    """
    if with_base and out is None:
        raise Invalid("--with-base needs a folder to write to: add --out DIR")
    progress("reading the log", 0.0)
    facts, signed = blocking(_read(session, run))
    if facts.spec is None:
        raise NotFound(f"there is no run {run!r}; `connito job list` shows the runs")
    if facts.ended is None:
        raise Retry(f"run {run} goes on; wait for its end with `connito job watch {run}`")
    manifest_ref = facts.spec.base.manifest
    manifest = Manifest.load(blocking(CustomerStore(session).fetch(manifest_ref, run)))
    context = JobContext(facts.spec.base.name, manifest, manifest_ref=manifest_ref, session=session, run=run)
    expert = _deposit(context, facts, signed)
    document = _document(facts, None if expert is None else expert.record, manifest.size)
    if measure and facts.selection is not None:
        document["measured"] = measured(facts, context, progress)
    progress("written", 1.0)
    delivered = Delivered(document, expert, context)
    return delivered if out is None else replace(delivered, written=write(delivered, out, with_base=with_base))


async def _read(session: Session, run: str) -> tuple[RunFacts, Record | None]:
    """Return the run's facts, and the library's message on its deposit as it is stored. A run ends before its expert is there:
    that is waited for. Raises `Retry` where the library does not come to it."""
    from connito.platform.log import read_log
    from connito.wire.facts import RunFacts

    async with session.bus() as bus:
        give_up = time.monotonic() + DEPOSIT_SECONDS
        while True:
            facts = (await read_log(bus, session.roster, run)).runs.get(run, RunFacts(run))
            if session.resting or facts.paused or not isinstance(plan(facts), Due):
                break
            # The library waits for scores, and not for ever.
            lacking = lacks_scores(facts)
            if time.monotonic() > give_up + (SCORING_SECONDS if lacking else 0.0):
                raise Retry(f"run {run} has ended, and the library has not deposited its expert yet; ask again later")
            await asyncio.sleep(5 * POLL_SECONDS if lacking else POLL_SECONDS)
        deposits = list(facts.deposits)
        subject = fact_subject(run, "library", 0, "deposited", deposits[0]) if deposits else ""
        return facts, await bus.last_record(subject) if deposits else None


def _deposit(context: JobContext, facts: RunFacts, signed: Record | None) -> Deposit | None:
    import json

    from connito.library.attestation import countersign

    for fact in facts.deposits.values():
        deposited = fact.message
        record = read_record(context.fetch(deposited.record).read_bytes(), deposited.expert_id)
        attestation = None
        if deposited.HasField("attestation") and signed is not None:
            part = json.loads(context.fetch(deposited.attestation).read_bytes())
            attestation = countersign(part, signed.subject, signed.data)
        return Deposit(record, context.fetch(deposited.expert), attestation)
    return None


def _document(facts: RunFacts, record: ExpertRecord | None, model_bytes: int) -> dict[str, Any]:
    spec = facts.require_spec()
    report = run_report(facts, model_bytes=model_bytes)
    read = covered(facts)
    start = None if facts.selection is None or not facts.selection.HasField("start") else facts.selection.start
    return {
        "run": facts.run,
        "domain": spec.domain,
        "base": {"name": spec.base.name, "manifest": spec.base.manifest.digest},
        "outcome": report["outcome"],
        "expert": None if record is None else {"expert_id": record["expert_id"], **record["expert"]},
        "license": spec.license,
        "data_statement": spec.data_statement,
        "visibility": spec.visibility or "public",
        "selection": report["selection"],
        "start": None if start is None else {"expert_id": start.expert_id, "detail": start.detail},
        "objective": {"improvement": spec.objective.improvement, "cycles": spec.cycles},
        "cycles": report["cycles"],
        "coverage": {"read": read.read, "there": read.there, "share": read.share},
        "shelf": shelf(facts),
        "contributors": [] if record is None else record["contributors"],
        "totals": report["totals"],
        "measured": None,
        "commands": _commands(facts.run, None if record is None else record["expert_id"], spec.base.name),
    }


def _commands(run: str, expert_id: str | None, base: str) -> dict[str, str]:
    found = {"audit": f"connito audit {run}"}
    if expert_id is not None:
        found |= {
            "take": f"connito job report {run} --out delivery --with-base",
            "verify": "connito library verify delivery/expert --base delivery/base",
            "export": f"connito library export {expert_id} --out expert",
        }
    return found


def measured(facts: RunFacts, context: JobContext, progress: Progress) -> dict[str, Any]:
    """Compare base and result on the target, every general domain and every benchmark, with paired intervals."""
    from connito.base.loading import load_full
    from connito.moe.device import device_of
    from connito.moe.evaluate import Evaluator
    from connito.moe.state import load_state
    from connito.wire.facts import experts_of

    spec, selection = facts.require_spec(), facts.require_selection()
    last = facts.latest_version
    final = selection.initial_state if last is None else last.state
    progress("loading the base", 0.1)
    layers, _ = experts_of(selection)
    evaluator = Evaluator(load_full(context.files(), device=device_of()), layers)
    state, origin = load_state(context.fetch(final)), load_state(context.fetch(selection.initial_state))
    rows: list[dict[str, Any]] = []
    parts = list(_parts(spec, context))
    for number, (use, name, table) in enumerate(parts):
        progress(f"measuring {name}", 0.2 + 0.8 * number / len(parts))
        before, tokens = evaluator.losses(evaluator.base, table)
        after, _ = evaluator.losses(state, table)
        row = {"use": use, "name": name, **_row(before, after, tokens)}
        if selection.start.expert_id:
            begun, _ = evaluator.losses(origin, table)
            row["start"] = float(begun.sum() / tokens.sum())
        rows.append(row)
    evaluator.restore()
    progress("asking for words", 0.9)
    right = _right(evaluator, context, parts, state)
    scores = _tasks(evaluator, context, spec, state, progress)
    return {"confidence": CONFIDENCE, "rows": rows, "apart": _apart(facts, rows), "right": right, **scores}


def _tasks(
    evaluator: Evaluator, context: JobContext, spec: run_pb2.RunSpec, state: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Return the scores of base and result on the tasks that the job named, or why there are none."""
    if not spec.tasks:
        return {"tasks": []}
    from connito.experts.tasks import Task, compare

    progress("asking the tasks", 0.95)
    stored = [context.sealed(ref.artifact).read_bytes() for ref in spec.tasks]
    try:
        tasks = [Task.decode(data) for data in stored]
        found = compare(tasks, evaluator.model, context.tokenizer, partial(evaluator.put, state))
    except Invalid as error:
        return {"tasks": [], "tasks_missing": str(error)}
    finally:
        evaluator.restore()
    return {"tasks": [asdict(row) for row in found]}


def _right(
    evaluator: Evaluator, context: JobContext, parts: list[tuple[str, str, npt.NDArray[Any]]], state: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return which next words and answers base and result get right, on the same text."""
    from connito.data.packing import tokens_of
    from connito.workloads.proof import GENERAL_TEXTS, TEXTS, Asked, before_and_after, compared

    asked, target = {}, next(name for use, name, _ in parts if use == "target")
    for use, name, table in parts:
        rows = tokens_of(table)[: TEXTS if use == "target" else GENERAL_TEXTS].tolist()
        texts = [context.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        asked[name] = Asked.of(name, texts, is_target=use == "target")
    before, after = before_and_after(
        evaluator.model, context.tokenizer, asked, evaluator.targets, partial(evaluator.put, state)
    )
    evaluator.restore()
    return compared(before, after, target)


def _parts(spec: run_pb2.RunSpec, context: JobContext) -> list[tuple[str, str, npt.NDArray[Any]]]:
    found = []
    for corpus in (spec.holdout, *spec.general_holdouts):
        rows = sequences(context.corpus(corpus), spec)
        use = "target" if corpus.domain == spec.holdout.domain else "general"
        found.append((use, corpus.domain, rows[subsets(rows, spec, corpus.domain).report]))
    for corpus in spec.benchmarks:
        rows = sequences(context.corpus(corpus), spec)
        found.append(("benchmark", corpus.domain, rows[:SEQUENCES]))
    return found


def _row(before: npt.NDArray[Any], after: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> dict[str, Any]:
    """Return a row in nats per token; `change` is after − before, with its interval."""
    found, total = paired(before.tolist(), after.tolist(), tokens.tolist(), CONFIDENCE), float(tokens.sum())
    return {
        "before": float(before.sum()) / total,
        "after": float(after.sum()) / total,
        "change": -found.effect,
        "low": -found.high,
        "high": -found.low,
        "sequences": found.sequences,
        "tokens": found.tokens,
    }


def _apart(facts: RunFacts, rows: list[dict[str, Any]]) -> float | None:
    """Return the largest distance of a final loss measured here from the one that the aggregator published, nats per token."""
    last = facts.latest_version
    if last is None:
        return None
    scores = [] if facts.benchmarked is None else facts.benchmarked.scores
    published = {score.name: score.after for score in scores if score.metric == LOSS}
    published |= {loss.domain: loss.after for loss in last.losses}
    apart = [abs(row["after"] - published[row["name"]]) for row in rows if row["name"] in published]
    return max(apart, default=None)


def write(delivered: Delivered, out: Path, *, with_base: bool = False) -> list[Path]:
    """Write `report.md`, `report.json`, `loss.svg`, the expert with record and card in `expert/`, and with `with_base` the base
    it belongs to in `base/`. Raises `Invalid` when `out` holds something else."""
    import json
    import shutil

    from connito.jobs.pages import markdown
    from connito.library.artifact import CARD_FILE, EXPERT_FILE, RECORD_FILE
    from connito.library.attestation import ATTESTATION_FILE
    from connito.library.attestation import encode as attested
    from connito.library.card import render
    from connito.library.record import encode
    from connito.views.loss_plot import loss_svg

    if out.exists() and any(out.iterdir()) and not (out / "report.json").is_file():
        raise Invalid(f"{out} holds something else than a delivery: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(delivered.document, indent=2) + "\n")
    (out / "report.md").write_text(markdown(delivered.document))
    (out / "loss.svg").write_text(loss_svg(delivered.document))
    written = [out / "report.md", out / "report.json", out / "loss.svg"]
    deposit = delivered.expert
    if deposit is not None:
        folder = out / "expert"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(deposit.expert, folder / EXPERT_FILE)
        (folder / RECORD_FILE).write_bytes(encode(deposit.record))
        (folder / CARD_FILE).write_text(render(deposit.record))
        if deposit.attestation is not None:
            (folder / ATTESTATION_FILE).write_bytes(attested(deposit.attestation))
        written.append(folder)
    if with_base:
        (out / "base").mkdir(exist_ok=True)
        for name, path in delivered.context.files().items():
            shutil.copyfile(path, out / "base" / name)
        written.append(out / "base")
    return written
