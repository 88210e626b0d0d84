from __future__ import annotations

from typing import Any

from connito.cli.explain import _standing
from connito.v1 import run_pb2
from connito.views import standings
from connito.wire.facts import RunFacts

from tests.unit.connito.protocol.scoring.test_trust import TRUTH, Season


def told(**policy: Any) -> RunFacts:
    season = Season(policy=run_pb2.RewardPolicy(validator_share=0.2, **policy))
    season.play({"VA": TRUTH, "VB": TRUTH, "VC": {"MC": 9.0}})
    season.play({"VA": TRUTH, "VB": TRUTH, "VC": None})
    return season.facts


def test_everybody_sees_who_lost_weight_and_why() -> None:
    rows = {row.validator: row for row in standings.validator_rows(told(bond_rate=0.1), 2)}
    assert (rows["VA"].agreement, rows["VA"].trust, rows["VA"].weight, rows["VA"].reason) == (1, 1, 1, "")
    assert (rows["VC"].reported, rows["VC"].reason, rows["VC"].reward) == (False, "no-report", 0)
    assert (rows["VC"].weight, round(rows["VC"].trust or 0, 6)) == (0.9, 0.81)
    (line,) = _standing(vars(rows["VC"]))
    assert line.endswith(
        "weight 0.900, agrees to 0.0 %, trust now 0.810  no-report: was drawn, and no report of it counts"
    )


def test_where_trust_does_not_move_nothing_is_said_of_it() -> None:
    rows = standings.validator_rows(told(), 2)
    assert {(row.agreement, row.trust, row.weight) for row in rows} == {(None, None, None)}
    assert [_standing(vars(row)) for row in rows] == [[], [], []]


def test_ratings_and_where_the_emission_went() -> None:
    facts = told(bond_rate=0.1)
    rated = standings.ratings(facts, 2)
    assert set(rated) == set(TRUTH)
    assert rated["MA"]["mu"] > rated["MB"]["mu"] > rated["MC"]["mu"]
    assert standings.rating_text(rated["MA"]) == f"{rated['MA']['mu']:.1f} ± {rated['MA']['sigma']:.1f}"
    assert standings.paid(facts, 2) == {"miners": 800, "validators": 200, "unallocated": 0}
    assert standings.ratings(facts, 3) == {}
