"""Validators over many cycles: who deviates or leaves a duty loses weight, who does not keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from connito.protocol.assignment import assign
from connito.protocol.rules import quorum_fault
from connito.protocol.scoring import trust
from connito.protocol.scoring.counted_reports import read_reports
from connito.protocol.scoring.verdicts import agree, no_quorum, score_cycle
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2, run_pb2
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RUN = "r"
TRUTH = {"MA": 0.3, "MB": 0.2, "MC": 0.0}


def even(validator: str) -> float:
    return 1.0


@dataclass
class Season:
    """A run told cycle by cycle: what each validator claims, or None for whoever stays silent."""

    policy: run_pb2.RewardPolicy = field(
        default_factory=lambda: run_pb2.RewardPolicy(bond_rate=0.1, validator_share=0.2)
    )
    each: int = 0
    facts: RunFacts = field(default_factory=lambda: RunFacts(RUN))
    cycle: int = 0
    sequence: int = 0

    def __post_init__(self) -> None:
        spec = run_pb2.RunSpec(run=RUN, domain="d", cycles=90, emission=1000, rewards=self.policy)
        spec.scoring.paid_ranks = 10
        spec.scoring.validators_per_submission = self.each
        self.put("run", 0, "created", run_pb2.RunCreated(spec=spec))

    def put(self, section: str, cycle: int, kind: str, message: Any, id_: str = "") -> None:
        self.sequence += 1
        self.facts.add(Fact(RUN, FactKey(section, cycle, kind, id_), message, "U", section.upper(), self.sequence, 0))

    def play(
        self,
        claims: Mapping[str, dict[str, float] | None],
        omitted: list[str] | tuple[()] = (),
        revealed: list[str] | tuple[()] = (),
        late: list[str] | tuple[()] = (),
        truth: dict[str, float] = TRUTH,
        stake: Callable[..., Any] = even,
    ) -> tuple[dict[str, cycle_pb2.ValidatorStanding], cycle_pb2.CycleScored]:
        """One cycle; `claims[validator]` is what it grants by miner, a callable of the miners it has to score, or None."""
        self.cycle = cycle = self.cycle + 1
        state = artifacts_pb2.ArtifactRef(digest=f"state-{cycle}")
        self.put("train", cycle, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=cycle, state=state))
        entries = [
            cycle_pb2.Submission(miner=m, commit_sequence=i, artifact=artifacts_pb2.ArtifactRef(digest=f"{m}-{cycle}"))
            for i, m in enumerate(truth, 1)
        ]
        self.put("submit", cycle, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=cycle, submissions=entries))
        names = sorted({*claims, *omitted})
        self.put("validate", cycle, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=cycle, expected=names))
        for name in (*revealed, *late):
            if name in late:
                closed = cycle_pb2.WindowClosed(run=RUN, cycle=cycle, last_sequence=self.sequence)
                self.put("validate", cycle, "closed", closed)
            self.put("validate", cycle, "seed", cycle_pb2.SeedRevealed(run=RUN, cycle=cycle, validator=name), name)
        seed = b"%032d" % cycle
        drawn = cycle_pb2.SeedDrawn(run=RUN, cycle=cycle, seed=seed, validators=sorted(claims), omitted=sorted(omitted))
        if claims:
            self.put("validate", cycle, "drawn", drawn)
        duties = assign(seed, truth, claims, self.each)
        for name, given_ in claims.items():
            if given_ is None:
                continue
            scores = [
                cycle_pb2.SubmissionScore(
                    miner=m,
                    artifact_digest=f"{m}-{cycle}",
                    utility=given_.get(m, 0.0),
                    reason=reasons_pb2.REASON_UNSPECIFIED if given_.get(m) else reasons_pb2.REASON_NO_IMPROVEMENT,
                )
                for m in sorted(duties[name])
            ]
            report = cycle_pb2.ScoreReport(
                run=RUN, cycle=cycle, validator=name, seed=seed, state_digest=state.digest, scores=scores
            )
            self.put("validate", cycle, "report", report, name)
        reports = read_reports(self.facts, cycle)
        fault = quorum_fault(self.facts, cycle, reports, stake)
        agreed = (
            no_quorum(self.facts, cycle, entries, fault) if fault else agree(self.facts, cycle, reports, entries, stake)
        )
        scored = score_cycle(self.facts, cycle, entries, agreed, {}, {}, {})
        self.put("merge", cycle, "scored", scored)
        assert (
            scored.unallocated + sum(v.reward for v in scored.verdicts) + sum(s.reward for s in scored.validators)
            == 1000
        )
        return {standing.validator: standing for standing in scored.validators}, scored


def test_who_says_what_the_others_say_keeps_all_its_weight() -> None:
    season = Season()
    for _ in range(5):
        standings, scored = season.play({"VA": TRUTH, "VB": TRUTH, "VC": TRUTH})
    assert {s.trust for s in standings.values()} == {1.0}
    assert {s.weight for s in standings.values()} == {1.0}
    assert [s.reward for s in standings.values()] == [67, 67, 66]
    assert scored.bonded == ["MA", "MB"]


@pytest.mark.parametrize(
    ("lie", "agreement"),
    [({"MC": 9.0}, 0.0), ({**TRUTH, "MC": 0.5}, 0.5), ({**TRUTH, "MA": 0.0}, 0.4), ({"MA": 0.6, "MB": 0.4}, 0.5)],
    ids=["a friend for all", "a friend too", "a rival sunk", "all doubled"],
)
def test_a_validator_that_deviates_loses_weight_cycle_by_cycle(lie: dict[str, float], agreement: float) -> None:
    season = Season()
    weights, pay = [], []
    for _ in range(30):
        standings, scored = season.play({"VA": TRUTH, "VB": TRUTH, "VC": lie})
        weights.append(standings["VC"].weight)
        pay.append(standings["VC"].reward)
        assert {v.miner: v.utility for v in scored.verdicts} == TRUTH
    assert standings["VC"].agreement == pytest.approx(agreement)
    assert (standings["VC"].reason == reasons_pb2.REASON_DEVIATED) == (agreement < 0.5)
    assert weights == sorted(weights, reverse=True)
    assert weights[:3] == pytest.approx([1.0, 1 - 0.1 * (1 - agreement), (1 - agreement) * 0.81 + agreement])
    assert weights[-1] >= trust.FLOOR
    assert weights[-1] == pytest.approx(max(trust.FLOOR, agreement), abs=0.05)
    assert standings["VA"].trust == standings["VB"].trust == 1.0
    assert pay[-1] < min(standings["VA"].reward, standings["VB"].reward)


def test_duties_that_are_left_cost_weight_and_say_which() -> None:
    season = Season()
    season.play({"VA": TRUTH, "VB": TRUTH, "VC": TRUTH, "VD": TRUTH})
    standings, _ = season.play({"VA": TRUTH, "VB": TRUTH, "VC": None}, omitted=["VD"])
    assert {name: s.trust for name, s in standings.items()} == pytest.approx({"VA": 1, "VB": 1, "VC": 0.9, "VD": 0.9})
    assert standings["VC"].reason == reasons_pb2.REASON_NO_REPORT
    assert standings["VD"].reason == reasons_pb2.REASON_SEED_WITHHELD
    assert (standings["VC"].reward, standings["VD"].reward) == (0, 0)


def test_who_had_no_duty_keeps_what_it_had() -> None:
    season = Season()
    season.play({"VA": TRUTH, "VB": TRUTH, "VC": {"MC": 1.0}})
    standings, _ = season.play({"VA": TRUTH, "VB": TRUTH})
    assert (standings["VC"].idle, standings["VC"].trust, standings["VC"].reward) == (True, 0.9, 0)
    standings, _ = season.play({"VA": TRUTH, "VB": TRUTH, "VC": TRUTH})
    assert standings["VC"].weight == 0.9
    assert standings["VC"].trust == pytest.approx(0.91)


def test_without_a_quorum_only_those_who_left_a_duty_lose() -> None:
    season = Season()
    standings, scored = season.play({"VA": TRUTH, "VB": None, "VC": None}, omitted=["VD"])
    assert {name: s.trust for name, s in standings.items()} == pytest.approx({"VA": 1, "VB": 0.9, "VC": 0.9, "VD": 0.9})
    assert scored.unallocated == 1000
    season = Season()
    standings, _ = season.play({}, omitted=["VA", "VB"], revealed=["VA"])
    assert {name: s.trust for name, s in standings.items()} == {"VA": 1.0, "VB": 0.9}


def test_a_secret_that_comes_behind_the_close_changes_nothing() -> None:
    """A validator that stood still reveals when it goes on: who computes later must find what was found without it."""
    before, _ = Season().play({}, omitted=["VA", "VB"], revealed=["VA"])
    after, _ = Season().play({}, omitted=["VA", "VB"], revealed=["VA"], late=["VB"])
    assert after == before
    assert after["VB"].reason == reasons_pb2.REASON_SEED_WITHHELD


def test_a_distrusted_third_never_leaves_one_of_the_others_to_decide_alone() -> None:
    season = Season()
    for _ in range(60):
        season.play({"VA": TRUTH, "VB": TRUTH, "VC": {"MC": 5.0}})
    _, scored = season.play({"VA": {**TRUTH, "MC": 5.0}, "VB": TRUTH, "VC": TRUTH})
    assert {v.miner: v.utility for v in scored.verdicts} == TRUTH


def test_without_a_rate_nothing_of_it_is_recorded() -> None:
    season = Season(policy=run_pb2.RewardPolicy())
    season.play({"VA": TRUTH, "VB": TRUTH, "VC": {"MC": 1.0}})
    standings, scored = season.play({"VA": TRUTH, "VB": TRUTH, "VC": {"MC": 1.0}})
    assert not scored.bonded
    assert all(s.trust == s.weight == s.agreement == 0.0 and not s.reason for s in standings.values())


def test_two_liars_of_five_lose_weight_where_the_seed_assigns_three() -> None:
    season = Season(each=3)
    truth = {f"M{i}": 0.1 * i for i in range(6)}
    lie = {**truth, "M0": 3.0, "M5": 0.0}
    claims = {"VA": truth, "VB": truth, "VC": truth, "VD": lie, "VE": lie}
    for _ in range(40):
        standings, _ = season.play(claims, truth=truth)
    liars, honest = ({name: standings[name].trust for name in names} for names in (("VD", "VE"), ("VA", "VB", "VC")))
    assert max(liars.values()) < min(honest.values())


claims = st.dictionaries(st.sampled_from(sorted(TRUTH)), st.floats(0, 10), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from(["VA", "VB", "VC", "VD"]), st.none() | claims, min_size=1), max_size=6))
def test_whatever_is_claimed_trust_stays_a_share_and_the_emission_adds_up(
    cycles: list[dict[str, dict[str, float] | None]],
) -> None:
    season = Season()
    for told in cycles:
        standings, _ = season.play(told)
        for standing in standings.values():
            assert 0.0 <= standing.agreement <= 1.0 + 1e-12
            assert 0.0 <= standing.trust <= 1.0 + 1e-12
            assert all(math.isfinite(bond) and bond >= 0.0 for bond in standing.bonds)
