"""Scores of base and result on the benchmarks and tasks that a customer named: in the log, on a record, in a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from connito.errors import Invalid
from connito.library.schema import ExpertRecord, Score
from connito.render import formats
from connito.v1.run_pb2 import BenchmarkScore, BenchmarksMeasured, RunPaused
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.roster import Roster
from connito.wire.subjects import parse_fact
from connito.wire.verification import verify_fact

# So long after a run's end the aggregator leaves out what it has not scored, and its expert is deposited without scores.
MEASURING_SECONDS, SCORING_SECONDS = 1.5 * 3600.0, 2 * 3600.0
# The streams in which it is said that a run is scored, or that nobody will.
SCORES_IN = ("RUNS", "LIBRARY")


def benchmark_key(run: str) -> str:
    """Return the key of the aggregator's action that scores a run, by which others know that it was set aside."""
    return f"{run}/benchmark"


def ends_wait(record: Record, roster: Roster) -> bool:
    """Return whether a record says, by who may, that its run is scored or that nobody will."""
    try:
        if parse_fact(record.subject)[1].kind not in ("benchmarked", "paused"):
            return False
        fact = verify_fact(record, roster)
    except Invalid:
        return False
    return not isinstance(fact.message, RunPaused) or _says_so(fact.message, fact.run)


def _says_so(notice: RunPaused, run: str) -> bool:
    return notice.service in ("aggregator", "library") and notice.action == benchmark_key(run)


def unscored_for(facts: RunFacts) -> str:
    """Return why nobody will score a run; empty where nobody has said so."""
    notice = _notice(facts)
    return "" if notice is None else notice.message.detail


def _notice(facts: RunFacts) -> Fact[RunPaused] | None:
    notices = facts.many(RunPaused, "run", 0, "paused").values()
    found = [fact for fact in notices if _says_so(fact.message, facts.run)]
    return min(found, key=lambda fact: fact.time_unix_ms, default=None)


def scored(facts: RunFacts) -> ExpertRecord:
    """Return the part of a record on benchmarks and tasks; empty for a run without any. What was written first holds: scores, or
    that there will be none.
    """
    spec, notice = facts.require_spec(), _notice(facts)
    measured = facts.one(BenchmarksMeasured, "library", 0, "benchmarked")
    if measured is not None and (notice is None or measured.time_unix_ms <= notice.time_unix_ms):
        missing = {entry.name: entry.why for entry in measured.message.unscored}
        found = {"scores": as_rows(measured.message.scores), **({"unscored": missing} if missing else {})}
        return cast("ExpertRecord", found)
    if notice is None:
        return cast("ExpertRecord", {})
    missing = {corpus.domain: notice.message.detail for corpus in (*spec.benchmarks, *spec.tasks)}
    return cast("ExpertRecord", {"unscored": missing} if missing else {})


def as_rows(scores: Iterable[BenchmarkScore]) -> list[Score]:
    """Return scores as a record has them."""
    rows: list[Score] = []
    for score in scores:
        rows.append(Score(
            name=score.name, metric=score.metric, items=score.items, before=score.before, after=score.after
        ))  # fmt: skip
        if score.HasField("low"):
            rows[-1]["change_low"], rows[-1]["change_high"] = score.low, score.high
    return rows


def as_messages(record: Mapping[str, object]) -> list[BenchmarkScore]:
    """Return the scores of a record as they are sent; none for a record without any."""
    rows = cast("Sequence[Score]", record.get("scores", ()))
    return [
        BenchmarkScore(
            name=row["name"], metric=row["metric"], items=row["items"], before=row["before"], after=row["after"],
            low=row.get("change_low"), high=row.get("change_high"),
        )
        for row in rows
    ]  # fmt: skip


def line(rows: Sequence[Score]) -> str:
    """Return the first score of each benchmark and task as a few words; empty for none."""
    first = {row["name"]: row for row in reversed(rows)}
    return "; ".join(
        f"{row['name']} {row['metric']} {row['before']:.3f} → {row['after']:.3f} ({formats.count(row['items'], 'item')})"
        for row in rows
        if first[row["name"]] is row
    )
