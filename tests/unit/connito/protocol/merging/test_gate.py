from __future__ import annotations

import pytest
from connito.protocol.merging.candidates import Attempt
from connito.protocol.merging.gate import Losses, Rule, choose, judge
from connito.v1 import cycle_pb2
from connito.v1.cycle_pb2 import Finding
from connito.views.sentences import sentence

ALL = cycle_pb2.GATE_DECISION_ACCEPTED
CALM = cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS
BEST = cycle_pb2.GATE_DECISION_TOP_1
WIDE = cycle_pb2.GATE_DECISION_WITH_GAINLESS
KEPT = cycle_pb2.GATE_DECISION_KEPT_INCUMBENT
STRICT = Rule("medical", 0.0)
TRIES = [Attempt(ALL, (0, 1, 2)), Attempt(CALM, (0, 1)), Attempt(BEST, (1,))]


def losses(target: float, **general: float) -> Losses:
    return Losses({name: (value * 100, 100) for name, value in {"medical": target, **general}.items()})


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (losses(2.9, code=2.0, law=2.0), ""),
        (losses(3.0, code=2.0, law=2.0), ""),
        (losses(2.9, code=2.05, law=2.0), ""),
        (losses(3.0001, code=1.0, law=1.0), "medical loss would rise"),
        (losses(2.0, code=2.0, law=2.06), "law loss would rise by 0.0600, over the margin of 0.0500"),
        (losses(float("nan"), code=2.0, law=2.0), "medical loss would not be a number"),
        (losses(2.0, code=float("nan"), law=2.0), "code loss would not be a number"),
        (losses(2.0, code=float("inf"), law=2.0), "code loss would rise by inf"),
    ],
)
def test_a_candidate_passes_only_if_target_and_every_general_domain_agree(after: Losses, why: str) -> None:
    refused = judge(losses(3.0, code=2.0, law=2.0), after, Rule("medical", 0.0500001))
    verdict = "" if refused is None else sentence(refused)

    assert verdict.startswith(why)
    assert bool(verdict) == bool(why)


def test_a_domain_without_gate_sequences_is_not_judged() -> None:
    before, after = Losses({"medical": (0.0, 0), "code": (2.0, 1)}), Losses({"medical": (0.0, 0), "code": (2.0, 1)})

    assert judge(before, after, STRICT) is None


@pytest.mark.parametrize(
    ("good", "decision"), [({ALL, CALM}, ALL), ({CALM, BEST}, CALM), ({BEST}, BEST), (set(), KEPT)]
)
def test_the_first_attempt_that_passes_stands(good: set[int], decision: int) -> None:
    tried = []

    def measure(attempt: Attempt) -> Losses:
        tried.append(attempt.decision)
        return losses(2.5 if attempt.decision in good else 3.5)

    outcome = choose(TRIES, losses(3.0), measure, STRICT)

    assert outcome.attempt.decision == decision
    assert outcome.after.per_token()["medical"] == (3.0 if decision == KEPT else 2.5)
    refused = len(tried) - (decision != KEPT)
    assert [(part.attempt, part.before, part.after) for part in outcome.refused.parts] == [
        (decision, 3.0, 3.5) for decision in tried[:refused]
    ]
    assert tried == [ALL, CALM, BEST][: len(tried)]


def test_a_candidate_that_cannot_be_built_is_refused_with_the_reason() -> None:
    overflow = Finding(kind=cycle_pb2.FINDING_KIND_GATE_OVERFLOW, name="down_proj")
    outcome = choose(TRIES[:2], losses(3.0), lambda a: overflow if a.decision == ALL else losses(2.0), STRICT)

    assert (outcome.attempt.decision, sentence(outcome.refused)) == (CALM, "all together: merging down_proj overflows")


def test_without_candidates_there_is_nothing_to_merge() -> None:
    outcome = choose([], Losses({}), lambda _: losses(0.0), STRICT)

    assert outcome.attempt == Attempt(cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE, ())


@pytest.mark.parametrize(
    ("with_all", "with_wide", "decision"),
    [(2.5, 2.4, WIDE), (2.5, 2.5, ALL), (2.4, 2.5, ALL), (2.5, 3.5, ALL), (3.5, 2.9, WIDE), (3.5, 3.5, BEST)],
)
def test_the_better_of_the_merges_with_and_without_the_gainless_stands(
    with_all: float, with_wide: float, decision: cycle_pb2.GateDecision.ValueType
) -> None:
    tries = [Attempt(ALL, (0,)), Attempt(WIDE, (0, 1)), Attempt(BEST, (0,))]
    after = {ALL: with_all, WIDE: with_wide, BEST: 2.8}
    outcome = choose(tries, losses(3.0), lambda attempt: losses(after[attempt.decision]), STRICT)

    assert outcome.attempt.decision == decision
    assert outcome.after.per_token()["medical"] == after[decision]
    refused = [part.attempt for part in outcome.refused.parts]
    assert refused == ([ALL, WIDE] if decision == BEST else [ALL] if with_all > 3 else [])
