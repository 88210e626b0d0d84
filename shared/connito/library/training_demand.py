"""Ranking of domains by expected gain of further training. Pure.

    score(d) = interest(d) · expected(d)
    interest(d) = 1 + uses(d) + misses(d)
    expected(d) = g · r · (1 − rᶜ) / (1 − r)      nats per token over c further cycles; c·g where r = 1

g is what the last cycle of the newest run on d saved on text that decided nothing; r is the median, over all runs of that
base, of a cycle's saving over the saving of the cycle before, at most 1. Where d was searched for and never trained, g·r
is replaced by the median first cycle of the other domains of the base, and the row says so. Uses are metered units of d's
experts; misses are searches that found no expert, or none that saved more than 0.01 nats per token on the given text.

Limits. The extrapolation assumes that savings shrink by one ratio and that text and settings stay as they were; a domain
whose text was exhausted looks better than it is. Interest counts, it does not weigh who asks; the constant 1 lets a
domain with a high gain and no visitors stand beside one that is visited and saturated. Intervals are not carried through:
the numbers rank, they do not promise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from connito.errors import Invalid
from connito.library.schema import Described
from connito.wire.facts import RunFacts

# A search by example whose best expert saves less than this has found nothing worth using.
WORTH = 0.01


@dataclass(frozen=True)
class Training:
    """One run on a domain: nats per token saved by each cycle, and its place in time."""

    domain: str
    base: str
    gains: tuple[float, ...]
    at: int = 0
    expert_id: str = ""


@dataclass(frozen=True)
class Search:
    """A search by somebody. `best` is what the best hit saves on the given text, None for a search by words."""

    domain: str
    hits: int
    best: float | None = None

    @property
    def missed(self) -> bool:
        """Return whether whoever searched went away without an expert worth using."""
        return self.hits == 0 or (self.best is not None and self.best < WORTH)


@dataclass
class Demand:
    """One row. `expected` is None where nothing was ever trained that could be compared with."""

    domain: str
    experts: int = 0
    uses: int = 0
    searches: int = 0
    misses: int = 0
    saved: float = 0.0
    last_cycle: float | None = None
    expected: float | None = None
    basis: str = ""
    expert_ids: list[str] = field(default_factory=list)

    @property
    def interest(self) -> int:
        """Return how often somebody wanted it, and one."""
        return 1 + self.uses + self.misses

    @property
    def score(self) -> float | None:
        """Return interest times expected gain."""
        return None if self.expected is None else self.interest * self.expected

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "interest": self.interest, "score": self.score}


def demand(
    trainings: Sequence[Training],
    uses: Mapping[str, int],
    searches: Iterable[Search],
    withdrawn: Collection[str] = (),
    *,
    cycles: int = 4,
) -> list[Demand]:
    """Rank domains, most wanted first; those without an expectation come last, by interest. `uses` by domain. Experts that
    are `withdrawn` serve nobody: a domain that has no other is expected to be like the others.

    Raises `Invalid` for less than one further cycle.
    """
    if cycles < 1:
        raise Invalid(f"cycles is {cycles}; ask for 1 or more")
    rows: dict[str, Demand] = {}
    trained, searches = {training.domain for training in trainings} | set(uses), list(searches)
    missed = {search.domain for search in searches if search.missed}
    for search in searches:
        if search.domain not in trained | missed:
            continue  # Words that found an expert are no domain that lacks one.
        row = rows.setdefault(search.domain, Demand(search.domain))
        row.searches, row.misses = row.searches + 1, row.misses + search.missed
    for domain, count in uses.items():
        rows.setdefault(domain, Demand(domain)).uses = count
    for training in sorted(trainings, key=lambda training: training.at):
        row = rows.setdefault(training.domain, Demand(training.domain))
        if not training.expert_id or training.expert_id not in withdrawn:
            _train(row, training, trainings, cycles)
    first = [training.gains[0] for training in trainings if training.gains]
    for row in rows.values():
        if not row.basis:
            _as_others(row, first, trainings, cycles)
    return sorted(
        rows.values(),
        key=lambda row: (row.score is None, -(row.score if row.score is not None else row.interest), row.domain),
    )


def _train(row: Demand, training: Training, everything: Sequence[Training], cycles: int) -> None:
    """Add a run's training. Runs come oldest first: the newest decides the expectation for the next one."""
    row.saved += sum(training.gains)
    if training.expert_id:
        row.experts += 1
        row.expert_ids.append(training.expert_id)
    if not training.gains:
        row.basis = row.basis or "no cycle was finished"
        return
    ratio = decay([other for other in everything if other.base == training.base])
    row.last_cycle = training.gains[-1]
    row.expected = max(0.0, row.last_cycle) * series(ratio, cycles)
    row.basis = f"last cycle {row.last_cycle:+.4f}, each later one {ratio:.2f} of it"


def _as_others(row: Demand, first: Sequence[float], trainings: Sequence[Training], cycles: int) -> None:
    if not first:
        row.basis = "nothing was trained yet"
        return
    ratio = decay(trainings)
    typical = max(0.0, median(first))
    row.expected = typical * (1 + series(ratio, cycles - 1))
    known = any(training.domain == row.domain for training in trainings)
    row.basis = f"{'its expert was withdrawn' if known else 'never trained'}; median first cycle of other domains {typical:+.4f}"


def decay(trainings: Iterable[Training]) -> float:
    """Return r: median ratio of successive savings, between 0 and 1; 1 without two cycles in a row."""
    ratios = [later / earlier for training in trainings for earlier, later in pairwise(training.gains) if earlier > 0]
    return min(1.0, max(0.0, median(ratios))) if ratios else 1.0


def series(ratio: float, cycles: int) -> float:
    """Return r + r² + … + rᶜ."""
    return float(sum(ratio**n for n in range(1, cycles + 1)))


def training_of(facts: RunFacts) -> Training | None:
    """Return the loss that a run saved in each cycle; None before it was created. A version's first loss is the target's."""
    spec = facts.spec
    if spec is None:
        return None
    gains = tuple(
        version.losses[0].before - version.losses[0].after for version in facts.versions.values() if version.losses
    )
    created = facts.created_fact
    ids = [fact.key.id for fact in facts.deposits.values()]
    at = 0 if created is None else created.sequence
    return Training(spec.domain, spec.base.manifest.digest, gains, at, ids[0] if ids else "")


def training_of_record(record: Described, at: int) -> Training:
    """Return the same of an expert on a shelf whose run's log is not at hand: its whole saving spread evenly over its
    versions.
    """
    own = next((row for row in record.get("losses", []) if row["domain"] == record["domain"]), None)
    versions = max(1, len(record.get("lineage", [])))
    saved = 0.0 if own is None or own["before"] is None or own["after"] is None else own["before"] - own["after"]
    gains = tuple([saved / versions] * versions) if own is not None else ()
    return Training(str(record["domain"]), str(record["base"]["manifest"]), gains, at, str(record["expert_id"]))
