"""What a created run still needs from the selector."""

from __future__ import annotations

import pytest
from connito.v1.run_pb2 import RunSpec

from services.selector.handlers import Select, Settled, decide

SPEC = RunSpec(run="medical")


def test_a_run_without_a_selection_needs_one() -> None:
    assert decide(SPEC, set()) == Select(SPEC)
    assert decide(SPEC, {"created", "miner"}) == Select(SPEC)


@pytest.mark.parametrize("kind", ["selected", "selection_failed", "ended"])
def test_what_is_settled_stays_so(kind: str) -> None:
    assert decide(SPEC, {kind}) == Settled(kind)


def test_a_selection_is_named_before_the_end() -> None:
    assert decide(SPEC, {"ended", "selected"}) == Settled("selected")
