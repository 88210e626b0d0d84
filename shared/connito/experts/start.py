"""θ_0 from the library: which expert of the same base saves most on the probe, measured on the full model.

Three sieves, each cheaper than the next: how much of the probe's routing goes through experts that a candidate has
trained; what it saves to first order (`predict`); what it saves in fact, paired over the probe's sequences. An expert is
taken when the interval, at the run's confidence shared out over those measured (Bonferroni), lies above zero.
Blocking; needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.experts.compose import Part, read_part, rows_of, state_of
from connito.experts.predict import predict_savings
from connito.library.start import AUTO, Shelved, refusal, seen_by, unknown
from connito.moe.evaluate import Evaluator
from connito.moe.layout import as_targets
from connito.moe.rows import read_rows
from connito.protocol.scoring.proof_of_loss import Paired, paired
from connito.v1 import reasons_pb2, run_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from connito.moe.selection import Selection
    from connito.moe.state import TargetState

# How many candidates go on to the next sieve.
PREDICTED, MEASURED = 16, 4
# Sequences of the probe that candidates are measured on; enough for an interval, few enough to be quick.
SEQUENCES = 64
_DIGITS = 6


@dataclass(frozen=True)
class Start:
    """The choice as the log carries it, and θ_0; None where it is the base's own."""

    choice: run_pb2.StartChoice
    state: TargetState | None


def propose(
    model: nn.Module,
    spec: run_pb2.RunSpec,
    selection: Selection,
    probe: npt.NDArray[Any],
    shelf: Sequence[Shelved],
    library_sequence: int,
) -> Start:
    """Choose a start expert from `shelf`, library experts of `model`'s base. `probe` int32 [n, L + 1]. The model is
    left as it was.

    Experts that the customer may not see are as if they were not there. Raises `Invalid` (START_IMPOSSIBLE) when the job
    names an expert that its terms or rows rule out.
    """
    sequences = probe[:SEQUENCES]
    visible = [entry for entry in shelf if seen_by(spec, entry.record)]
    if spec.start_from != AUTO and shelf and not visible:
        raise unknown(spec)
    rows = [_Row.of(entry, spec, selection) for entry in visible]
    if spec.start_from != AUTO and rows and rows[0].candidate.refused:
        raise Invalid(
            f"the job cannot start from {spec.start_from}: {rows[0].candidate.refused}; write start_from: auto or none",
            reason=reasons_pb2.REASON_START_IMPOSSIBLE,
        )
    open_ = [row for row in rows if not row.candidate.refused]
    near = sorted(open_, key=lambda row: (-row.mass, row.candidate.expert_id))[:PREDICTED]
    predicted = predict_savings(model, [row.part for row in near], sequences)
    for row in near:
        row.candidate.predicted = round(predicted[row.part.name], _DIGITS)
    best = sorted(near, key=lambda row: (-row.candidate.predicted, row.candidate.expert_id))[:MEASURED]
    _measure(model, spec, selection, sequences, best)
    ordered = sorted(rows, key=lambda row: _order(row.candidate))
    choice = run_pb2.StartChoice(
        library_sequence=library_sequence, candidates=[row.candidate for row in ordered], detail=""
    )
    chosen = _chosen(spec, ordered)
    choice.detail = _detail(chosen, len(rows), len(best))
    if chosen is None:
        return Start(choice, None)
    choice.expert_id, choice.shared_rows = chosen.candidate.expert_id, chosen.candidate.shared_rows
    return Start(choice, _merged(read_rows(model, selection), chosen.part, as_targets(selection)))


@dataclass
class _Row:
    """A candidate on its way through the sieves. `mass` is the share of the probe's routing that its rows serve."""

    candidate: run_pb2.StartCandidate
    part: Part
    mass: float

    @classmethod
    def of(cls, entry: Shelved, spec: run_pb2.RunSpec, selection: Selection) -> _Row:
        whole, targets = read_part(entry.path), selection.layers
        shared = {key: row for key, row in whole.rows.items() if key[1] in targets.get(key[0], ())}
        places = sorted({key[:2] for key in shared})
        candidate = run_pb2.StartCandidate(
            expert_id=entry.deposit.expert_id,
            expert=entry.deposit.expert,
            record=entry.deposit.record,
            refused=entry.notice or refusal(entry.record, spec),
            shared_rows=len(places),
        )
        if not candidate.refused and not places:
            candidate.refused = "it has trained none of the selected experts"
        mass = sum(selection.scores[layer][expert] for layer, expert in places)
        return cls(candidate, Part(candidate.expert_id, whole.digest, shared, whole.header), mass)


def _measure(
    model: nn.Module,
    spec: run_pb2.RunSpec,
    selection: Selection,
    sequences: npt.NDArray[Any],
    rows: Sequence[_Row],
) -> None:
    """Measure the loss that each of `rows` saves, with its interval; a single sequence has no interval."""
    if not rows:
        return
    level = 1 - (1 - (spec.scoring.confidence or 0.95)) / len(rows)
    evaluator = Evaluator(model, selection)
    before, tokens = evaluator.losses(None, sequences)
    try:
        for row in rows:
            after, _ = evaluator.losses(_merged(evaluator.base, row.part, evaluator.targets), sequences)
            _write(row.candidate, paired(before.tolist(), after.tolist(), tokens.tolist(), level))
    finally:
        evaluator.restore()


def _write(candidate: run_pb2.StartCandidate, found: Paired) -> None:
    candidate.measured = found.finite
    if found.finite:
        candidate.saved, candidate.low, candidate.high = (
            round(value, _DIGITS) for value in (found.effect, found.low, found.high)
        )


def _merged(base: Mapping[str, Any], part: Part, targets: Mapping[int, Sequence[int]]) -> TargetState:
    """Return the selection's rows with those of the part in the places that it has trained."""
    return state_of({**rows_of(targets, base), **part.rows})


def _order(candidate: run_pb2.StartCandidate) -> tuple[bool, bool, float, str]:
    """Return a sort key: measured before predicted before refused, then by the loss saved."""
    value = candidate.saved if candidate.measured else candidate.predicted
    return bool(candidate.refused), not candidate.measured, -value, candidate.expert_id


def _chosen(spec: run_pb2.RunSpec, ordered: Sequence[_Row]) -> _Row | None:
    if spec.start_from != AUTO:
        return ordered[0] if ordered else None
    return next((row for row in ordered if row.candidate.measured and row.candidate.low > 0), None)


def _detail(chosen: _Row | None, considered: int, measured: int) -> str:
    if chosen is None:
        return (
            f"from the base: none of {considered} experts, {measured} of them measured, surely lowers loss on the probe"
        )
    row = chosen.candidate
    return (
        f"from {row.expert_id}, which saves {row.saved:.4f} nats per token on the probe "
        f"({row.low:.4f} to {row.high:.4f}); {considered} considered, {measured} measured"
    )
