"""What the gate takes for chance, and how far that takes whoever uses it up on purpose."""

from __future__ import annotations

import math

import numpy as np
import pytest
from connito.protocol.merging.candidates import Attempt
from connito.protocol.merging.gate import Losses, Rule, choose, judge
from connito.v1 import cycle_pb2, run_pb2
from connito.views.sentences import sentence
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey
from numpy.typing import NDArray

TARGET, GENERAL = "medical", "code"
SEQUENCES, TOKENS = 32, 64
MARGIN = 0.02
RULE = Rule(TARGET, 0.01, MARGIN)
Rows = NDArray[np.float64]
BASE: Rows = np.linspace(2.5, 3.5, SEQUENCES)


def losses(target: Rows, general: float = 2.0, *, tokens: int = TOKENS, rows: bool = True) -> Losses:
    """Losses of sequences in nats per token."""
    sums = tuple(float(loss) * tokens for loss in target)
    counts = (tokens,) * len(target)
    of = {TARGET: (math.fsum(sums), sum(counts)), GENERAL: (general * 100, 100)}
    return Losses(of, {TARGET: (sums, counts)} if rows else {})


def apart(mean: float, spread: float) -> Rows:
    """A rise by `mean` of which sequences differ by `spread`, half of them up and half of them down."""
    return BASE + mean + spread * np.where(np.arange(SEQUENCES) % 2, 1.0, -1.0)


@pytest.mark.parametrize(
    ("after", "passes"),
    [
        (apart(0.004, 0.02), True),
        (apart(0.008, 0.02), False),
        (apart(0.012, 0.06), True),
        (apart(MARGIN + 1e-6, 0.5), False),
        (apart(0.004, 0.0), False),
        (apart(-0.004, 0.0), True),
        # One sequence of 32 broken: a t test alone never tells.
        (BASE + np.eye(SEQUENCES)[0], False),
        (BASE + np.eye(SEQUENCES)[0] * 0.9 * MARGIN * SEQUENCES, True),
        (np.where(np.arange(SEQUENCES), BASE, math.inf), False),
    ],
)
def test_a_rise_passes_where_chance_explains_it_and_the_margin_allows_it(after: Rows, passes: bool) -> None:
    assert (judge(losses(BASE), losses(after), RULE) is None) == passes


@pytest.mark.parametrize(
    ("before", "after", "margin"),
    [
        (losses(BASE), losses(apart(0.004, 0.02)), 0.0),
        (losses(BASE, rows=False), losses(apart(0.004, 0.02)), MARGIN),
        (losses(BASE), losses(apart(0.004, 0.02), rows=False), MARGIN),
        (losses(BASE), losses(apart(0.004, 0.02), tokens=TOKENS + 1), MARGIN),
        (losses(BASE[:1]), losses(BASE[:1] + 1e-6), MARGIN),
    ],
    ids=["no margin", "no sequences before", "none after", "other sequences", "one sequence"],
)
def test_without_sequences_to_compare_no_rise_passes(before: Losses, after: Losses, margin: float) -> None:
    refused = judge(before, after, Rule(TARGET, 0.01, margin))

    assert refused is not None
    assert refused.kind == cycle_pb2.FINDING_KIND_GATE_TARGET_ROSE


def test_what_the_incumbent_allows_is_held_to_the_best_version_too() -> None:
    best, incumbent = losses(BASE), losses(apart(0.004, 0.02))
    after = losses(apart(0.008, 0.02))

    assert judge(incumbent, after, RULE) is not None, "the same rows, all a little higher"
    noisy = losses(apart(0.008, -0.02))
    assert judge(incumbent, noisy, RULE) is None
    refused = judge(incumbent, noisy, Rule(TARGET, 0.01, MARGIN, best=best))
    assert refused is not None
    assert sentence(refused) == "medical loss would be 3.0080, above 3.0000 of the best version"


class Log:
    """Versions as a run publishes them, of a gate that takes what may pass."""

    def __init__(self, margin: float = MARGIN, drift: float = 0.05) -> None:
        self.facts, self.cycle, self.incumbent = RunFacts("r"), 0, losses(BASE)
        spec = run_pb2.RunSpec()
        spec.holdout.domain = TARGET
        spec.merging.gate_target_margin, spec.merging.gate_general_margin = margin, 0.01
        spec.merging.gate_general_drift = drift
        self._put("run", 0, "created", run_pb2.RunCreated(spec=spec))

    def _put(
        self, section: str, cycle: int, kind: str, message: run_pb2.RunCreated | cycle_pb2.VersionPublished
    ) -> None:
        self.facts.add(Fact("r", FactKey(section, cycle, kind), message, "", "MERGE", len(self.facts.facts) + 1, 0))

    def offer(self, after: Losses) -> bool:
        """One cycle with one candidate; return whether it became the next version."""
        self.cycle += 1
        rule = Rule.of(self.facts, self.cycle)
        outcome = choose([Attempt(cycle_pb2.GATE_DECISION_ACCEPTED, (0,))], self.incumbent, lambda _: after, rule)
        version = cycle_pb2.VersionPublished(
            run="r", cycle=self.cycle, version=self.cycle, gate=outcome.attempt.decision
        )
        for domain, (_, tokens) in outcome.after.sums.items():
            old, new = self.incumbent.per_token(), outcome.after.per_token()
            loss = version.gate_losses.add(domain=domain, before=old[domain], after=new[domain], tokens=tokens)
            if domain in outcome.after.rows:
                loss.before_sums.extend(self.incumbent.rows[domain][0])
                loss.after_sums.extend(outcome.after.rows[domain][0])
                loss.sequence_tokens.extend(outcome.after.rows[domain][1])
        self._put("merge", self.cycle, "version", version)
        self.incumbent = outcome.after
        return outcome.attempt.decision == cycle_pb2.GATE_DECISION_ACCEPTED


def worst(log: Log, rng: np.random.Generator, spread: float) -> Rows:
    """The worst state that the attacker finds to pass: it knows the gate's text, the rule and the log."""
    rows = np.array(log.incumbent.rows[TARGET][0]) / TOKENS
    rule, found = Rule.of(log.facts, log.cycle + 1), rows
    for rise in np.linspace(0.0, 2 * MARGIN, 161):
        noise = rng.normal(0.0, spread, SEQUENCES)
        tried = rows + rise + noise - noise.mean()
        if judge(log.incumbent, losses(tried), rule) is None and tried.mean() > found.mean():
            found = tried
    return np.asarray(found)


@pytest.mark.parametrize("spread", [0.005, 0.05, 0.5])
def test_whoever_harms_within_the_noise_for_thirty_cycles_never_gets_above_the_best_version_by_more_than_the_margin(
    spread: float,
) -> None:
    log, rng = Log(), np.random.default_rng(7)
    log.offer(losses(BASE - 0.01))
    risen = []
    for _ in range(30):
        log.offer(losses(worst(log, rng, spread)))
        risen.append(log.incumbent.per_token()[TARGET] - (float(BASE.mean()) - 0.01))

    assert 0.0 < max(risen) <= MARGIN


def test_without_a_best_version_each_cycle_gives_anew() -> None:
    """Why the incumbent alone is no bound: the same attacker against a rule that forgets."""
    incumbent, rng = losses(BASE), np.random.default_rng(7)
    for _ in range(30):
        rows = np.array(incumbent.rows[TARGET][0]) / TOKENS
        noise = rng.normal(0.0, 0.05, SEQUENCES)
        tried = losses(rows + 0.008 + noise - noise.mean())
        incumbent = tried if judge(incumbent, tried, RULE) is None else incumbent

    assert incumbent.per_token()[TARGET] - float(BASE.mean()) > 5 * MARGIN


def test_general_text_may_rise_a_little_in_a_cycle_and_a_little_more_in_all() -> None:
    log, told = Log(drift=0.05), []
    for cycle in range(1, 21):
        after = losses(BASE - 0.001 * cycle, log.incumbent.per_token()[GENERAL] + 0.009)
        told.append(log.offer(after))

    assert told[:6] == [True] * 5 + [False]
    assert log.incumbent.per_token()[GENERAL] == pytest.approx(2.045)
    refused = judge(log.incumbent, losses(BASE - 1, 2.0545), Rule.of(log.facts, 21))
    assert refused is not None
    assert sentence(refused) == "code loss would lie 0.0545 above the lowest so far, over 0.0500"
    assert log.offer(losses(BASE - 0.1, 1.9)), "back below, it starts from there"
    assert Rule.of(log.facts, 22).lowest[GENERAL] == pytest.approx(1.9)


def test_without_a_margin_and_a_drift_the_rule_is_that_of_earlier_runs() -> None:
    log = Log(margin=0.0, drift=0.0)
    told = [log.offer(losses(BASE, 2.0 + 0.009 * cycle)) for cycle in range(1, 21)]

    assert all(told)
    assert Rule.of(log.facts, 21).best is None
    assert not log.offer(losses(apart(1e-6, 0.5)))
