"""Proof-of-Loss: does a submission lower held-out loss, by how much, and how sure is that?

Loss of the full model before (θ_t) and after (θ_t with the submission's rows) is measured on the same sequences, so the
comparison is paired: what makes one sequence harder than another cancels.

The interval is a t interval on the ratio Σ(before − after) / Σ tokens, with the variance of the ratio from its
residuals. Held-out rows are packed to one length, where this is exactly the paired t interval of the mean difference.
It is preferred over a bootstrap because n is small (6 to 64): percentile intervals are too narrow there, and a
bootstrap needs a random stream that every recomputation would have to share.

With racing (`connito.protocol.scoring.racing`) the sequences are compared look by look until the interval decides. The
decision is a function of the losses alone, so whoever has a report can tell where its validator had to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from connito.errors import Invalid
from connito.protocol.scoring.racing import InterimLook, looks
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.cycle_pb2 import Finding


@dataclass(frozen=True)
class Paired:
    """A paired comparison in nats per token; positive `effect` means the loss fell.

    `low` and `high` bound it at the confidence asked for; they are infinite for a single sequence. `deviation` is the
    standard error. `finite` is False when a loss was not a number, `changed` when no loss differs at all.
    """

    effect: float
    low: float
    high: float
    deviation: float
    sequences: int
    tokens: int
    finite: bool = True
    changed: bool = True


class Judgement(NamedTuple):
    """Utility in nats per token (0 with a reason), and what it rests on."""

    utility: float
    reason: reasons_pb2.Reason.ValueType
    finding: Finding


class GeneralChange(NamedTuple):
    """Mean over domains of the change in general loss, nats per token, and its upper bound. Positive is worse."""

    mean: float
    high: float


def _t_quantile(confidence: float, freedom: float) -> float:
    from scipy.special import stdtrit

    if not 0.0 < confidence < 1.0:
        raise Invalid(
            f"the confidence level is {confidence}; it must lie between 0 and 1, for example 0.95",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    return float(stdtrit(freedom, 0.5 + confidence / 2))


def paired(before: Sequence[float], after: Sequence[float], tokens: Sequence[int], confidence: float) -> Paired:
    """Compare per-sequence losses: sums of token negative log-likelihoods [n] before and after, token counts [n].

    Sums are exactly rounded (`math.fsum`), so the order of sequences does not matter. Raises `Invalid` when the three
    do not have one common, positive length or a token count is not positive.
    """
    n = len(tokens)
    if n == 0 or len(before) != n or len(after) != n or min(tokens) <= 0:
        raise Invalid(
            f"cannot pair {len(before)} losses before, {len(after)} after and {n} token counts; they must be equally "
            "many, at least one, and every count positive"
        )
    total = sum(int(count) for count in tokens)
    if not all(map(math.isfinite, (*before, *after))):
        return Paired(0.0, -math.inf, math.inf, math.inf, n, total, finite=False)
    gains = [float(old) - float(new) for old, new in zip(before, after, strict=True)]
    effect = math.fsum(gains) / total
    changed = any(gains)
    if n == 1:
        return Paired(effect, -math.inf, math.inf, math.inf, n, total, changed=changed)
    residuals = math.fsum((gain - effect * count) ** 2 for gain, count in zip(gains, tokens, strict=True))
    deviation = math.sqrt(residuals * n / (n - 1)) / total
    half = _t_quantile(confidence, n - 1) * deviation
    return Paired(effect, effect - half, effect + half, deviation, n, total, changed=changed)


def general_change(general: Mapping[str, Paired], confidence: float) -> GeneralChange:
    """Return the change of general loss over domains, each weighing the same; bound by Welch–Satterthwaite. Zero
    without domains.
    """
    if not general:
        return GeneralChange(0.0, 0.0)
    domains = [general[name] for name in sorted(general)]
    mean = -math.fsum(domain.effect for domain in domains) / len(domains)
    variances = [domain.deviation**2 for domain in domains]
    total = math.fsum(variances)
    if not math.isfinite(total) or total == 0.0:
        return GeneralChange(mean, mean if total == 0.0 else math.inf)
    spread = math.fsum((v / total) ** 2 / (domain.sequences - 1) for v, domain in zip(variances, domains, strict=True))
    return GeneralChange(mean, mean + _t_quantile(confidence, 1 / spread) * math.sqrt(total) / len(domains))


def judge(
    target: Paired, general: Mapping[str, Paired], policy: run_pb2.ScorePolicy, *, unchanged: bool = False
) -> Judgement:
    """Return utility of a submission, or why it has none.

    u = effect if the lower bound of the target effect is above zero and general text is retained. Retention is broken
    when the *point estimate* of the mean general change exceeds the margin (asking for a significant excess would let
    a submission hide damage behind variance), or when one domain alone got worse by more than the margin
    significantly (the mean over domains could hide that). `unchanged`: the artifact is the base state itself.
    """
    if not target.finite or not all(domain.finite for domain in general.values()):
        return Judgement(0.0, reasons_pb2.REASON_NON_FINITE, Finding(kind=cycle_pb2.FINDING_KIND_LOSS_NOT_FINITE))
    if unchanged or not target.changed:
        return Judgement(0.0, reasons_pb2.REASON_UNCHANGED, Finding(kind=cycle_pb2.FINDING_KIND_LOSS_UNCHANGED))
    if target.effect <= 0.0:
        return Judgement(0.0, reasons_pb2.REASON_NO_IMPROVEMENT, _gain(cycle_pb2.FINDING_KIND_NO_GAIN, target))
    if target.low <= 0.0:
        return Judgement(0.0, reasons_pb2.REASON_NOT_SIGNIFICANT, _gain(cycle_pb2.FINDING_KIND_UNCERTAIN_GAIN, target))
    broken = _broken_retention(general, policy)
    if broken is not None:
        return Judgement(0.0, reasons_pb2.REASON_RETENTION_BROKEN, broken)
    return Judgement(target.effect, reasons_pb2.REASON_UNSPECIFIED, _gain(cycle_pb2.FINDING_KIND_GAIN, target))


def _gain(kind: cycle_pb2.FindingKind.ValueType, target: Paired) -> Finding:
    return Finding(kind=kind, effect=target.effect, low=target.low, high=target.high, sequences=target.sequences)


def _broken_retention(general: Mapping[str, Paired], policy: run_pb2.ScorePolicy) -> Finding | None:
    margin = policy.retention_margin
    mean = general_change(general, policy.confidence).mean
    if mean > margin:
        kind = cycle_pb2.FINDING_KIND_GENERAL_LOSS_ROSE
        return Finding(kind=kind, change=mean, count=len(general), margin=margin)
    for name, domain in sorted(general.items()):
        # The interval of the change is the mirror image of the interval of the effect.
        if -domain.high > margin:
            kind = cycle_pb2.FINDING_KIND_DOMAIN_LOSS_ROSE
            return Finding(kind=kind, domain=name, change=-domain.effect, margin=margin)
    return None


def judge_look(
    look: InterimLook,
    target: Paired,
    general: Mapping[str, Paired],
    policy: run_pb2.ScorePolicy,
    *,
    unchanged: bool = False,
) -> Judgement | None:
    """Return the judgement of a look, from comparisons at its confidence; None when more sequences are needed.

    Before the last look only what is clear is decided: better, with general text retained up to the bound of its
    change; not better; harmful. From half of the budget on, an effect of at most zero is given up as well: this can
    only cost a submission its utility, never grant one, so it leaves the error as it is.
    """
    found = judge(target, general, policy, unchanged=unchanged)
    if look.last or found.reason in (reasons_pb2.REASON_NON_FINITE, reasons_pb2.REASON_UNCHANGED):
        return found
    if target.high <= 0.0 or (target.effect <= 0.0 and 2 * look.target >= policy.target_sequences):
        return found
    change, margin = general_change(general, look.confidence), policy.retention_margin
    # The interval of the change is symmetric: its lower bound is 2·mean − high.
    if 2 * change.mean - change.high > margin or any(-domain.high > margin for domain in general.values()):
        broken = _broken_retention(general, policy)
        assert broken is not None, "an estimate lies above its lower bound"
        return Judgement(0.0, reasons_pb2.REASON_RETENTION_BROKEN, broken)
    return found if found.utility > 0.0 and change.high <= margin else None


Losses = Mapping[str, Sequence[cycle_pb2.SequenceLoss]]


@dataclass(frozen=True)
class RaceResult:
    """A submission as far as it was evaluated: losses and comparisons by domain, the look that decided, and what."""

    losses: Losses
    target: Paired
    general: Mapping[str, Paired]
    look: InterimLook
    judgement: Judgement


def race(
    measure: Callable[[InterimLook], Losses],
    target_domain: str,
    policy: run_pb2.ScorePolicy,
    *,
    unchanged: bool = False,
) -> RaceResult:
    """Look until a look decides. `measure(look)` gives all losses up to and including those of the look, by domain.

    Raises `Invalid` when no loss is of the target domain.
    """
    for look in looks(policy):
        losses = measure(look)
        if not losses.get(target_domain):
            raise Invalid(f"there are no losses of the target domain {target_domain!r} to score a submission by")
        compared = {name: _compare(of_domain, look.confidence) for name, of_domain in losses.items()}
        target = compared.pop(target_domain)
        judgement = judge_look(look, target, compared, policy, unchanged=unchanged)
        if judgement is not None:
            return RaceResult(losses, target, compared, look, judgement)
    raise AssertionError("the last look decides")


def score_of(
    miner: str, artifact_digest: str, raced: RaceResult, policy: run_pb2.ScorePolicy
) -> cycle_pb2.SubmissionScore:
    """Return the signed part of a receipt."""
    judgement = raced.judgement
    score = cycle_pb2.SubmissionScore(
        miner=miner,
        artifact_digest=artifact_digest,
        utility=judgement.utility,
        reason=judgement.reason,
        finding=judgement.finding,
        losses=[loss for of_domain in raced.losses.values() for loss in of_domain],
        evaluated_sequences=raced.target.sequences if policy.minimum_sequences else 0,
    )
    if judgement.reason != reasons_pb2.REASON_NON_FINITE:
        change = general_change(raced.general, raced.look.confidence)
        score.effect, score.effect_low, score.effect_high = raced.target.effect, raced.target.low, raced.target.high
        score.general_change, score.general_change_high = change.mean, change.high
    return score


def score_submission(
    miner: str,
    artifact_digest: str,
    losses: Iterable[cycle_pb2.SequenceLoss],
    target_domain: str,
    policy: run_pb2.ScorePolicy,
    *,
    unchanged: bool = False,
) -> cycle_pb2.SubmissionScore:
    """Return the signed part of a receipt, from per-sequence losses. Recomputing it from a report's losses explains a
    score.

    Raises `Invalid` when no loss is of the target domain, and with racing when the evaluation did not stop at the look
    that decides.
    """
    by_domain: dict[str, list[cycle_pb2.SequenceLoss]] = {}
    for loss in losses:
        by_domain.setdefault(loss.domain, []).append(loss)

    def recorded(look: InterimLook) -> Losses:
        if not policy.minimum_sequences:
            return by_domain
        wanted = {name: look.target if name == target_domain else look.general for name in by_domain}
        for name, count in wanted.items():
            if len(by_domain[name]) < count:
                raise Invalid(
                    f"stopped after {len(by_domain[name])} sequences of {name}, before a look had decided; "
                    f"the next one is at {count}"
                )
        return {name: by_domain[name][:count] for name, count in wanted.items()}

    raced = race(recorded, target_domain, policy, unchanged=unchanged)
    for name, of_domain in by_domain.items():
        if len(of_domain) > len(raced.losses[name]):
            raise Invalid(
                f"went on to {len(of_domain)} sequences of {name}, although the look at {len(raced.losses[name])} decided"
            )
    return score_of(miner, artifact_digest, raced, policy)


def _compare(losses: Sequence[cycle_pb2.SequenceLoss], confidence: float) -> Paired:
    return paired(
        [loss.before for loss in losses], [loss.after for loss in losses], [loss.tokens for loss in losses], confidence
    )
