"""A whole run in one pass: every check, in the order in which things happened, and the first divergence by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from connito.audit import admission, chain, heads, history, intake, judging, recompute
from connito.audit.artifacts import Artifacts
from connito.audit.differences import NOBODY, OPERATOR, Difference, Step
from connito.audit.evidence import Evidence, signatures
from connito.errors import Invalid
from connito.protocol.policy.choices import TOKENS
from connito.protocol.retention import horizon
from connito.runtime.progress import Notify, silent
from connito.wire.subjects import WINDOWS
from connito.wire.verification import CATALOGUE

if TYPE_CHECKING:
    from connito.audit.remeasure import Models

_PURE: dict[str, Callable[[Evidence, int], Step]] = {
    "commitments": intake.commitments,
    "submissions": intake.submissions,
    "rules": judging.cycle_rules,
    "reports": judging.reports,
    "verdicts": judging.verdicts,
    "gate": judging.gate,
    "versions": history.versions,
}

# Nats per token by which a loss measured on another machine may differ.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Options:
    """`model`: also recompute what needs it. `threads`: for that, 0 as many as there are cores."""

    model: bool = True
    threads: int = 0
    tolerance: float = TOLERANCE
    say: Notify = silent
    kept: Mapping[str, str] = field(default_factory=dict)
    # Without them, what the log alone shows: for whoever may not read the store.
    files: bool = True


@dataclass(frozen=True)
class Audit:
    """The outcome. `windows` is the hash chain of the log by window."""

    run: str
    steps: list[Step]
    messages: int
    windows: dict[str, str]
    model: bool
    seconds: float
    files: bool = True

    @property
    def differences(self) -> list[Difference]:
        """Return every difference, in the order of the run."""
        return [difference for step in self.steps for difference in step.differences]

    @property
    def first(self) -> Difference | None:
        """Return the first difference; None if there is none."""
        return next(iter(self.differences), None)

    @property
    def blame(self) -> list[str]:
        """Return who is to blame for the differences, the operator first: `operator`, `validator U…`, `miner U…`, `nobody`."""
        order = (OPERATOR, "validator", "miner", NOBODY)
        return sorted({one.by for one in self.differences}, key=lambda by: (order.index(by.split()[0]), by))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document that `connito audit --json` prints."""
        return {
            "run": self.run,
            "result": "differs" if self.differences else "same",
            "blame": self.blame,
            "first": None if self.first is None else self.first.to_json(),
            "differences": [difference.to_json() for difference in self.differences],
            "checks": [step.to_json() for step in self.steps],
            "chain": {"head": chain.head(self.windows), "windows": self.windows},
            "messages": self.messages,
            "model": self.model,
            "files": self.files,
            "seconds": round(self.seconds, 2),
        }


def audit(evidence: Evidence, artifacts: Artifacts, options: Options) -> Audit:
    """Recompute a run under its own rules. Blocking. A check that cannot be made because something is missing is a
    difference. Raises `Invalid` for rules that are newer than this program."""
    artifacts.check_key()
    began = time.monotonic()
    steps = list(_steps(evidence, artifacts, options))
    return Audit(
        evidence.run,
        steps,
        len(evidence.records),
        chain.windows_of(evidence.records),
        options.model,
        time.monotonic() - began,
        options.files,
    )


def against(audited: Audit, other: dict[str, str]) -> Audit:
    """Add a comparison with the chain that another auditor found."""
    broken = chain.first_break(audited.windows, other)
    what = "the log read here is not the one that the other audit read"
    found = (Difference("chain", broken, what),) if broken else ()
    return replace(audited, steps=[*audited.steps, Step("chain", 0, len(other), found)])


def attempt(check: str, cycle: int, work: Callable[[], Step]) -> Step:
    """Make a check; if the record does not allow it, that is its finding."""
    try:
        return work()
    except (Invalid, AssertionError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        why = str(error) or type(error).__name__
        where = f"cycle {cycle}" if cycle else "run"
        return Step(check, cycle, 1, (Difference(check, where, f"cannot be recomputed: {why}", cycle),))


def _steps(evidence: Evidence, artifacts: Artifacts, options: Options) -> Iterator[Step]:
    facts, history_of = evidence.facts, heads.read(evidence)
    yield signatures(evidence, history_of.covers)
    if options.files:
        yield artifacts.step()
    if facts.spec is None:
        what = "is not in the log, or does not verify; nothing can be recomputed without it"
        yield Step("spec", 0, 1, (Difference("spec", "run.0.created", what),))
        return
    yield attempt("admission", 0, lambda: admission.admission(evidence))
    yield attempt("stakes", 0, lambda: admission.stakes(evidence))
    work = recompute.Recomputation(evidence, artifacts, options.tolerance, say=options.say)
    yield from _cycles(work, options)
    if options.files:
        yield attempt("expert", 0, lambda: recompute.expert(work))
    yield history.ending(evidence)
    # What these show has a cause by name above, where it can be recomputed.
    yield history_of.step
    yield attempt("receipts", 0, lambda: heads.receipts(evidence))
    if options.kept:
        yield heads.kept(evidence, history_of, options.kept)


def _cycles(work: recompute.Recomputation, options: Options) -> Iterator[Step]:
    evidence, models = work.evidence, None
    if options.model and options.files and evidence.facts.selection is not None:
        from connito.audit import remeasure

        models = remeasure.Models(evidence, work.artifacts, options.threads)
        yield attempt("selection", 0, lambda: remeasure.selection(work))
        work = replace(work, measure=models.measure)
    kept = horizon(evidence.facts)
    if kept > 1:
        yield Step(
            "retention", 0, 0, (), f"artifacts of cycles before {kept} are not kept: those are checked by the log alone"
        )
    for cycle in cycles_of(evidence):
        yield from pure(evidence, cycle)
        if options.files and cycle >= kept and evidence.facts.window("train", cycle).opened is not None:
            yield from recomputed(work, models, cycle)


def recomputed(work: recompute.Recomputation, models: Models | None, cycle: int, only: str = "") -> Iterator[Step]:
    """Yield the checks of one cycle that need its artifacts. `only`: measure this miner's submission again, not
    everybody's.
    """
    yield attempt("content", cycle, lambda: recompute.refused_content(work, cycle))
    yield attempt("draws", cycle, lambda: recompute.draws(work, cycle))
    if models is not None:
        from connito.audit import remeasure

        yield attempt("losses", cycle, lambda: remeasure.losses(work, models, cycle, only))
        if work.evidence.facts.require_spec().merging.weighting == TOKENS:
            yield attempt("claims", cycle, lambda: remeasure.claims(work, models, cycle, only))
    yield attempt("merge", cycle, lambda: recompute.merge(work, cycle))


def cycles_of(evidence: Evidence) -> list[int]:
    """Return every cycle of which a service said anything, also past one whose opening is missing. A validator may speak of any
    cycle, and what it says of one that never was is no gap in the operator's log.
    """
    said = (key for key in evidence.facts.facts if key.cycle > 0 and key.section in WINDOWS)
    return sorted({key.cycle for key in said if CATALOGUE[key.section, key.kind][1] != "validator"})


def pure(evidence: Evidence, cycle: int) -> Iterator[Step]:
    """Yield the checks of one cycle that need the log alone, in the order of its windows."""
    yield history.windows(evidence, cycle)
    if evidence.facts.window("train", cycle).opened is None:
        return
    for name, check in _PURE.items():
        yield attempt(name, cycle, partial(check, evidence, cycle))
