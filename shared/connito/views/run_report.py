"""Report of a run as one JSON document: a pure projection of its facts.

The layout is part of the public interface: keys are added, never renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views.sentences import detail_of, why_left
from connito.views.standings import paid, ratings, validator_rows
from connito.wire.enums import plain_name, reason_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.subjects import WINDOWS

_NOT_REVEALED = reason_name(reasons_pb2.REASON_NOT_REVEALED)


def run_report(facts: RunFacts, *, model_bytes: int = 0, totals: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the report of a run, finished or not. `model_bytes` is the size of the base; `totals` adds what was
    measured outside of the log (seconds, memory, restarts).
    """
    spec, selection = facts.require_spec(), facts.selection
    cycles = [cycle_report(facts, cycle) for cycle in facts.versions]
    return {
        "run": facts.run,
        "base": spec.base.name,
        "domain": spec.domain,
        "outcome": outcome(facts),
        "cycles": cycles,
        "library": library_entry(facts),
        "selection": None if selection is None else _selection(selection),
        "totals": {**_totals(facts, cycles, model_bytes), **(totals or {})},
    }


def outcome(facts: RunFacts) -> dict[str, str]:
    """Return how the run ended: `{"status", "reason", "detail"}`; status `running` while it has not."""
    if facts.ended is None:
        paused = facts.paused[0].reason if facts.paused else reasons_pb2.REASON_UNSPECIFIED
        return {"status": "running", "reason": reason_name(paused), "detail": why_left(facts)}
    status = plain_name(run_pb2.RunOutcome, facts.ended.outcome)
    return {"status": status, "reason": reason_name(facts.ended.reason), "detail": facts.ended.detail}


def cycle_report(facts: RunFacts, cycle: int) -> dict[str, Any]:
    """Return one cycle: losses in nats per token on the report subset, everybody's result, and where the time went."""
    version = facts.version(cycle)
    assert version is not None, "a cycle is reported once its version is published"
    target, general = list(version.losses[:1]), list(version.losses[1:])
    rows = submission_rows(facts, cycle)
    rank = {row["key"]: row["rank"] for row in rows}
    sizes = [
        item.artifact.size for item in facts.window("submit", cycle).submissions if item.origin_cycle in (0, cycle)
    ]
    return {
        "cycle": cycle,
        "model_version": version.version,
        "state_digest": version.state.digest,
        "target_loss_before": _mean([loss.before for loss in target]),
        "target_loss_after": _mean([loss.after for loss in target]),
        "general_loss_before": _mean([loss.before for loss in general]),
        "general_loss_after": _mean([loss.after for loss in general]),
        "domains": {
            loss.domain: {"before": loss.before, "after": loss.after, "tokens": loss.tokens} for loss in version.losses
        },
        "submissions": rows,
        "validators": [vars(row) for row in validator_rows(facts, cycle)],
        "paid": paid(facts, cycle),
        "merged": [miner_name(facts, key) for key in sorted(version.merged, key=lambda key: rank.get(key) or 1 << 30)],
        "gate": plain_name(cycle_pb2.GateDecision, version.gate),
        "gate_detail": detail_of(version),
        "upload_bytes_per_miner": round(fmean(sizes)) if sizes else 0,
        "seconds": window_seconds(facts, cycle),
    }


def submission_rows(facts: RunFacts, cycle: int) -> list[dict[str, Any]]:
    """Return the miners that were expected or acted in a cycle: best rank first, then those refused.

    A verdict outweighs a refusal: whoever sent a second commitment still has the first one scored.
    """
    rows: dict[str, dict[str, Any]] = {}
    for miner in _expected_miners(facts, cycle):
        rows[miner] = _row(facts, miner, "absent" if facts.version(cycle) else "working")
    for window in ("commit", "submit"):
        for fact in facts.window(window, cycle).accepted.values():
            _advance(facts, rows, window, fact)
        for fact in sorted(facts.window(window, cycle).refused.values(), key=lambda fact: fact.sequence):
            _refuse(facts, rows, fact)
    scored = facts.scored(cycle)
    for verdict in scored.verdicts if scored is not None else ():
        rows[verdict.miner] = _judged(facts, verdict)
    rated = ratings(facts, cycle)
    for row in rows.values():
        row["rating"] = rated.get(row["key"])
    return sorted(rows.values(), key=lambda row: (row["rank"] or 1 << 30, row["status"], row["miner"]))


def miner_name(facts: RunFacts, key: str) -> str:
    """Return the label a miner enrolled with, or the start of its key."""
    return facts.label(key) or short_key(key)


def window_seconds(facts: RunFacts, cycle: int) -> dict[str, float]:
    """Return length of each closed window by the broker's clock."""
    seconds = {}
    for window in WINDOWS:
        opened, closed = facts.window(window, cycle).opened_fact, facts.window(window, cycle).closed_fact
        if opened is not None and closed is not None:
            seconds[window] = round((closed.time_unix_ms - opened.time_unix_ms) / 1000, 3)
    return seconds


def library_entry(facts: RunFacts) -> dict[str, Any] | None:
    """Return `{"expert_id", "digest", "bytes"}` of what the run left in the library; None before, or where nothing was
    deposited.
    """
    for fact in facts.deposits.values():
        expert = fact.message.expert
        return {"expert_id": fact.message.expert_id, "digest": expert.digest, "bytes": expert.size}
    return None


def _row(facts: RunFacts, miner: str, status: str, reason: str = "", detail: str = "") -> dict[str, Any]:
    return {
        "miner": miner_name(facts, miner),
        "key": miner,
        "status": status,
        "reason": reason,
        "detail": detail,
        "utility": 0.0,
        "rank": 0,
        "reward": 0,
        "withheld": 0,
        "origin_cycle": 0,
    }


def _judged(facts: RunFacts, verdict: cycle_pb2.Verdict) -> dict[str, Any]:
    row = _row(
        facts,
        verdict.miner,
        plain_name(cycle_pb2.VerdictStatus, verdict.status),
        reason_name(verdict.reason),
        detail_of(verdict),
    )
    measured = {"utility": verdict.utility, "rank": verdict.rank, "reward": verdict.reward}
    measured["withheld"] = verdict.withheld
    return {**row, **measured, "origin_cycle": verdict.origin_cycle}


def _advance(facts: RunFacts, rows: dict[str, dict[str, Any]], window: str, fact: Fact) -> None:
    """Set a miner's status to the accepted commitment or reveal while the cycle runs."""
    message = fact.message
    miner = message.submission.miner if isinstance(message, cycle_pb2.RevealAccepted) else getattr(message, "miner", "")
    rows[miner] = _row(facts, miner, "committed" if window == "commit" else "revealed")


def _refuse(facts: RunFacts, rows: dict[str, dict[str, Any]], fact: Fact[cycle_pb2.Refused]) -> None:
    """Record the first refusal; "not revealed" is replaced by the outcome of a reveal that came later."""
    refused = fact.message
    known = rows.get(refused.miner)
    told = known is not None and (known["status"] == "revealed" or known["reason"] not in ("", _NOT_REVEALED))
    told = told and refused.reason != reasons_pb2.REASON_NEWCOMER_QUOTA
    still_standing = known is not None and known["status"] == "committed" and refused.window == cycle_pb2.WINDOW_COMMIT
    if not told and not still_standing:
        rows[refused.miner] = _row(facts, refused.miner, "refused", reason_name(refused.reason), detail_of(refused))


def _expected_miners(facts: RunFacts, cycle: int) -> list[str]:
    opened, enrolled = facts.window("train", cycle).opened, set(facts.miners)
    return [] if opened is None else [key for key in opened.expected if key in enrolled]


def _selection(selection: run_pb2.SelectionMade) -> dict[str, Any]:
    return {
        "layers": {str(layer.layer): list(layer.experts) for layer in selection.layers},
        "selected": selection.selected_experts,
        "total": selection.total_experts,
        "target_parameters": selection.target_parameters,
        "model_parameters": selection.model_parameters,
    }


def _totals(facts: RunFacts, cycles: list[dict[str, Any]], model_bytes: int) -> dict[str, Any]:
    rewards: dict[str, int] = {}
    rated = ratings(facts, cycles[-1]["cycle"]) if cycles else {}
    for cycle in cycles:
        for row in cycle["submissions"]:
            rewards[row["miner"]] = rewards.get(row["miner"], 0) + row["reward"]
    uploads = [cycle["upload_bytes_per_miner"] for cycle in cycles if cycle["upload_bytes_per_miner"]]
    upload = round(fmean(uploads)) if uploads else 0
    return {
        "target_loss_first": cycles[0]["target_loss_before"] if cycles else None,
        "target_loss_last": cycles[-1]["target_loss_after"] if cycles else None,
        "general_loss_first": cycles[0]["general_loss_before"] if cycles else None,
        "general_loss_last": cycles[-1]["general_loss_after"] if cycles else None,
        "rewards": rewards,
        "ratings": {miner_name(facts, key): rating for key, rating in rated.items()},
        "upload_bytes_per_miner_and_cycle": upload,
        "model_bytes": model_bytes,
        "upload_share_of_model": upload / model_bytes if model_bytes else None,
        "validators": len(facts.validators),
        "miners": len(facts.miners),
    }


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
