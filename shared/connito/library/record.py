"""The record of a library expert: where it comes from, what it changes and what it was measured to do.

Everything is taken from the run's facts, so the record of a run is the same bytes whoever builds it, and whenever.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence

from connito.errors import Invalid
from connito.library.governance import governance
from connito.library.interval import change_interval
from connito.library.schema import Contributor, ExpertRecord, Loss, Signature, Version
from connito.library.scores import scored
from connito.library.start import start_record
from connito.v1 import cycle_pb2, reasons_pb2
from connito.wire.enums import plain_name, reason_name
from connito.wire.facts import RunFacts

RECORD_FORMAT = "connito-record/1"
RECORD_MEDIA_TYPE = "application/vnd.connito.record+json"
CARD_MEDIA_TYPE = "text/markdown"

# Gate outcomes under which a version differs from its parent.
MERGED = frozenset(
    {
        cycle_pb2.GATE_DECISION_ACCEPTED,
        cycle_pb2.GATE_DECISION_WITH_GAINLESS,
        cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS,
        cycle_pb2.GATE_DECISION_TOP_1,
    }
)


def expert_id(domain: str, digest: str) -> str:
    """Return `<domain>-<first 12 hex digits of the expert file's digest>`, with what a subject cannot hold as `-`."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', domain)[:60]}-{digest[:12]}"


# Long: one document, written down key by key in the order in which readers meet it.
def build_record(
    facts: RunFacts,
    digest: str,
    size: int,
    parameters: int,
    signature: Signature | None = None,
    parent: ExpertRecord | None = None,
) -> ExpertRecord:
    """Return the record of the expert file `digest` (`size` bytes, `parameters` numbers) that came out of a run.

    `signature`: the routing signature that the selection names, where it does. `parent`: the record of the expert that
    the run started from; whoever may take data out of that one may take it out of this one.
    Raises `Invalid` when the run is not finished or published no version.
    """
    spec, selection, ended = facts.spec, facts.selection, facts.ended_fact
    history = list(facts.versions.values())
    if spec is None or selection is None or ended is None or not history:
        raise Invalid(f"run {facts.run} has no finished model version to describe; wait until it has ended")
    record: ExpertRecord = {
        "format": RECORD_FORMAT,
        "expert_id": expert_id(spec.domain, digest),
        "domain": spec.domain,
        "version": ended_at(facts, history).version,
        "parents": [],
        "run": spec.run,
        "created": datetime.datetime.fromtimestamp(ended.time_unix_ms / 1000, datetime.UTC).isoformat(
            timespec="milliseconds"
        ),
        "base": {"name": spec.base.name, "manifest": spec.base.manifest.digest},
        "expert": {"digest": digest, "bytes": size, "parameters": parameters},
        "model_parameters": selection.model_parameters,
        "selection": {
            "method": spec.selection.method,
            "threshold": spec.selection.threshold,
            "layers": {str(layer.layer): sorted(layer.experts) for layer in selection.layers},
            "selected": selection.selected_experts,
            "total": selection.total_experts,
            "report": selection.report.digest,
        },
        "losses": _losses(history),
        "lineage": _lineage(facts, history),
        "contributors": _contributors(facts, [version.cycle for version in history]),
        "license": spec.license,
        "data_statement": spec.data_statement,
        "customer": spec.customer,
        "training_data": spec.train.artifact.digest,
        "signature": signature,
        "governance": {
            "visibility": spec.visibility or "public",
            "organisation": spec.organisation,
            "owner": spec.customer,
            "sources": sorted(
                {
                    *spec.data_sources,
                    *filter(None, [spec.train.artifact.digest]),
                    *([] if parent is None else governance(parent)["sources"]),
                }
            ),
        },
    }
    record["protocol"] = spec.protocol_version
    record |= scored(facts)
    start = start_record(selection)
    return record if start is None else {**record, "parents": [start["expert_id"]], "started_from": start}


def ended_at(facts: RunFacts, history: Sequence[cycle_pb2.VersionPublished]) -> cycle_pb2.VersionPublished:
    """Return the version that a run ended with."""
    final = 0 if facts.ended is None else facts.ended.final_version
    return next((version for version in history if version.version == final), history[-1])


def _losses(history: list[cycle_pb2.VersionPublished]) -> list[Loss]:
    """Return nats per token on the report subset, target first: before the first version, after the last, and the
    paired 95 % interval of the change where the versions tell the losses sequence by sequence.
    """
    first = {loss.domain: loss for loss in history[0].losses}
    rows: list[Loss] = []
    for loss in history[-1].losses:
        began = first.get(loss.domain)
        interval = began and change_interval(began.before_sums, loss.after_sums, loss.sequence_tokens)
        before = None if began is None else began.before
        rows.append({"domain": loss.domain, "before": before, "after": loss.after, "tokens": loss.tokens})
        if interval:
            rows[-1]["change_low"], rows[-1]["change_high"] = interval
    return rows


def _lineage(facts: RunFacts, history: Iterable[cycle_pb2.VersionPublished]) -> list[Version]:
    rows: list[Version] = []
    for version in history:
        opened = facts.window("train", version.cycle).opened
        rows.append(
            {
                "version": version.version,
                "parent": version.parent,
                "state": version.state.digest,
                "parent_state": "" if opened is None else opened.state.digest,
                "gate": plain_name(cycle_pb2.GateDecision, version.gate).replace("-", "_"),
                "merged": dict(zip(version.merged, version.weights, strict=True)),
            }
        )
    return rows


def _contributors(facts: RunFacts, cycles: Iterable[int]) -> list[Contributor]:
    """Return every miner that was ever judged: reward and its share of all that was paid, cycles merged, refusals."""
    table: dict[str, Contributor] = {}
    for cycle in cycles:
        scored = facts.scored(cycle)
        for verdict in [] if scored is None else scored.verdicts:
            row = table.setdefault(verdict.miner, no_part(verdict.miner, facts.label(verdict.miner)))
            row["reward"] += verdict.reward
            row["merged"] += verdict.status == cycle_pb2.VERDICT_STATUS_MERGED
            if verdict.reason != reasons_pb2.REASON_UNSPECIFIED:
                name = reason_name(verdict.reason)
                row["reasons"][name] = row["reasons"].get(name, 0) + 1
    paid = sum(row["reward"] for row in table.values())
    for row in table.values():
        row["share"] = row["reward"] / paid if paid else 0.0
    return sorted(table.values(), key=lambda row: (-row["reward"], row["miner"]))


def no_part(miner: str, label: str) -> Contributor:
    """Return the row of a contributor before anything is added to it."""
    return {"miner": miner, "label": label, "reward": 0, "merged": 0, "share": 0.0, "reasons": {}}


def encode(record: ExpertRecord) -> bytes:
    """Return the record's bytes: sorted keys, so that its digest depends on its content alone."""
    return json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
