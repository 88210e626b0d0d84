"""Experts of the library as the console's key may see them, from the log alone: where they came from, and their standing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from connito.library.governance import Viewer
from connito.library.scores import line, scored
from connito.library.start import notice_of, notices
from connito.library.training_demand import Demand, demand, training_of
from connito.render import formats
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.roster import Roster
from connito.wire.subjects import LIBRARY

from .views import Curve, curves

Runs = Mapping[str, RunFacts]
Sees = Callable[[RunFacts, run_pb2.ExpertDeposited | None], bool]


@dataclass(frozen=True)
class ExpertRow:
    """An expert in the library, with what the log says about it. `notice`: why it is not to be used, empty for good standing.

    `parents`: what it was made of, or what its run started from. A `derived` one has no run.
    """

    expert_id: str
    run: str
    domain: str
    base: str
    base_digest: str
    digest: str
    size: str
    record: ArtifactRef
    deposited_unix_ms: int
    curves: tuple[Curve, ...]
    licence: str = ""
    notice: str = ""
    parents: tuple[str, ...] = ()
    scores: str = ""

    @property
    def derived(self) -> bool:
        """Return whether a customer made it of other experts."""
        return self.run == LIBRARY

    @property
    def withdrawn(self) -> bool:
        """Return whether no search may find it."""
        return bool(self.notice) and not self.notice.startswith("deprecated")

    @property
    def target(self) -> Curve | None:
        """Return the loss curve on the expert's own domain."""
        return next((curve for curve in self.curves if curve.target), None)

    def curve(self, domain: str) -> Curve | None:
        """Return the loss curve on a domain, if its run measured it."""
        return next((curve for curve in self.curves if curve.domain == domain), None)


@dataclass(frozen=True)
class Family:
    """The experts that one was made of, and those that were made of it."""

    parents: tuple[str, ...]
    children: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """A search: every word somewhere in the row; `everything`: withdrawn ones, too."""

    words: str = ""
    domain: str = ""
    base: str = ""
    everything: bool = False

    @property
    def narrows(self) -> bool:
        """Return whether something is searched for: without, everything is listed, with its standing."""
        return bool(self.words.split() or self.domain or self.base)


def wanted(form: Mapping[str, str]) -> Wanted:
    """Return the search that an address or a form asks for."""
    return Wanted(form.get("q", ""), form.get("domain", ""), form.get("base", ""), everything="all" in form)


def seen_by(key: str, roster: Roster) -> Sees:
    """Return whether a key may see an expert, or a run's: a public one, its own, its organisation's, as the operator any."""
    return seen_as(Viewer(key, roster.memberships(key), everything=roster.permits("operator", key)))


def seen_as(viewer: Viewer) -> Sees:
    """Return whether a reader may see an expert, or a run's."""

    def sees(facts: RunFacts, deposit: run_pb2.ExpertDeposited | None) -> bool:
        return viewer.sees({"governance": _rules(facts, deposit)})

    return sees


def _rules(facts: RunFacts, deposit: run_pb2.ExpertDeposited | None) -> dict[str, str]:
    """Return whom an expert is shown to: as its run says, or, where none made it, its deposit."""
    if facts.spec is not None:
        spec = facts.spec
        return {"visibility": spec.visibility or "public", "organisation": spec.organisation, "owner": spec.customer}
    if deposit is None or not deposit.visibility:
        return {"visibility": "private", "owner": ""}
    return {"visibility": deposit.visibility, "organisation": deposit.organisation, "owner": deposit.owner}


def expert_rows(runs: Runs, sees: Sees) -> list[ExpertRow]:
    """Return the experts that may be seen, the newest first."""
    deposits = {fact.message.expert_id: fact for facts in runs.values() for fact in facts.deposits.values()}
    against = notices(fact for facts in runs.values() for fact in facts.notices.values())
    rows = [
        _row(runs, facts, fact, deposits, against)
        for facts in runs.values()
        for fact in facts.deposits.values()
        if sees(facts, fact.message)
    ]
    return sorted(rows, key=lambda row: (-row.deposited_unix_ms, row.expert_id))


def matching(rows: Iterable[ExpertRow], wanted: Wanted) -> list[ExpertRow]:
    """Return the rows that a search finds. Withdrawn ones are found by nobody who does not ask for them."""
    terms = wanted.words.lower().split()
    found = []
    for row in rows:
        text = " ".join((row.expert_id, row.run, row.domain, row.base, row.digest, row.licence)).lower()
        fits = (
            all(term in text for term in terms) and wanted.domain in ("", row.domain) and wanted.base in ("", row.base)
        )
        if fits and (wanted.everything or not wanted.narrows or not row.withdrawn):
            found.append(row)
    return found


def family(row: ExpertRow, rows: Sequence[ExpertRow]) -> Family:
    """Return the relatives of an expert among those that may be seen."""
    known = {other.expert_id for other in rows}
    return Family(
        tuple(name for name in row.parents if name in known),
        tuple(sorted(other.expert_id for other in rows if row.expert_id in other.parents)),
    )


def comparison(rows: Iterable[ExpertRow]) -> list[str]:
    """Return the domains that at least one of these experts was measured on, targets first."""
    found = [curve for row in rows for curve in row.curves]
    return list(
        dict.fromkeys(curve.domain for curve in sorted(found, key=lambda curve: (not curve.target, curve.domain)))
    )


def wanted_next(runs: Runs, sees: Sees, cycles: int = 4) -> list[Demand]:
    """Rank domains by what further training promises and by use; runs that may not be seen do not count."""
    seen = [facts for facts in runs.values() if sees(facts, None) and facts.spec is not None]
    uses: dict[str, int] = {}
    for facts in seen:
        domain, units = facts.require_spec().domain, sum(fact.message.units for fact in facts.uses.values())
        uses[domain] = uses.get(domain, 0) + units
    trainings = [training for facts in seen if (training := training_of(facts)) is not None]
    withdrawn = {row.expert_id for row in expert_rows(runs, sees) if row.withdrawn}
    return demand(trainings, {domain: units for domain, units in uses.items() if units}, (), withdrawn, cycles=cycles)


def _row(
    runs: Runs,
    facts: RunFacts,
    fact: Fact[run_pb2.ExpertDeposited],
    deposits: Mapping[str, Fact[run_pb2.ExpertDeposited]],
    against: Mapping[str, str],
) -> ExpertRow:
    message, spec = fact.message, facts.spec
    sources = sorted(_sources(runs, message.expert_id, deposits, set()))
    return ExpertRow(
        expert_id=message.expert_id,
        run=fact.run,
        domain=message.domain,
        base=_base_name(runs, message.base_digest) if spec is None else spec.base.name,
        base_digest=message.base_digest,
        digest=message.expert.digest,
        size=formats.size(message.expert.size or sum(ref.size for ref in message.files)),
        record=message.record,
        deposited_unix_ms=fact.time_unix_ms,
        curves=tuple(curves(facts)) if spec is not None else (),
        licence="" if spec is None else spec.license,
        notice=notice_of({"governance": {"sources": sources}}, message.expert_id, against),
        parents=tuple(message.parents),
        scores="" if spec is None else line(scored(facts).get("scores", ())),
    )


def _base_name(runs: Runs, digest: str) -> str:
    specs = [facts.spec for facts in runs.values() if facts.spec is not None]
    return next((spec.base.name for spec in specs if spec.base.manifest.digest == digest), "")


def _sources(
    runs: Runs, expert: str, deposits: Mapping[str, Fact[run_pb2.ExpertDeposited]], seen: set[str]
) -> Iterable[str]:
    """Yield the data that an expert, or what it was made of, was trained on, as its record names it."""
    fact = deposits.get(expert)
    if fact is None or expert in seen:
        return
    seen.add(expert)
    spec = runs[fact.run].spec
    if spec is not None:
        yield from (*spec.data_sources, *filter(None, [spec.train.artifact.digest]))
    for parent in fact.message.parents:
        yield from _sources(runs, parent, deposits, seen)
