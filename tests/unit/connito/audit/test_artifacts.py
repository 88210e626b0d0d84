"""Which artifacts an audit, or the explanation of one submission, asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from connito.audit.artifacts import Named, named
from connito.audit.evidence import Evidence
from connito.audit.receipts import needs
from connito.protocol.scoring.copies import REMEMBERED_CYCLES
from connito.v1 import cycle_pb2, run_pb2

from tests.support.run import Run, ref, theta

BEGAN = "state that it began from"


def test_the_states_that_works_began_from_are_asked_for() -> None:
    run = Run()
    run.created(run.spec(cycles=9, retention=run_pb2.RetentionPolicy(cycles=1))).selected()
    entry = cycle_pb2.Submission(miner="M", artifact=ref("a" * 64), base_state=theta(0), origin_cycle=1)
    run.say("train", 1, "opened", state=theta(0))
    run.say("submit", 1, "settled", submissions=[entry])
    evidence = cast(Evidence, SimpleNamespace(facts=run.facts, name=str, library=[]))
    found = [one.what for one in named(evidence)]
    assert "submission of M" in found
    assert BEGAN in found


def test_an_explanation_asks_for_what_a_submission_was_held_against_and_for_nothing_older() -> None:
    now = REMEMBERED_CYCLES + 5

    def asks(what: str, cycle: int, miner: str = "") -> bool:
        return needs(Named(what, ref("a" * 64), cycle, miner), now)

    assert asks("submission of M", now, "M")
    assert asks("submission of M", now - REMEMBERED_CYCLES, "M")
    assert not asks("submission of M", now - REMEMBERED_CYCLES - 1, "M"), "each may be as large as the model"
    assert asks("state of version 1", 1)
    assert asks("base manifest", 0)
    assert asks("refused artifact of M", now, "M")
    assert not asks("refused artifact of M", now - 1, "M")
    assert not asks("submission of M", now + 1, "M")
    assert not asks("library expert", 0)
