"""What a created run still needs from the selector."""

from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.protocol.findings import PROTOCOL_VERSION
from connito.v1.run_pb2 import RunSpec

from services.selector.handlers import Select, Settled, decide

SPEC = RunSpec(run="medical", protocol_version=PROTOCOL_VERSION)


def test_a_run_without_a_selection_needs_one() -> None:
    assert decide(SPEC, set()) == Select(SPEC)
    assert decide(SPEC, {"created", "miner"}) == Select(SPEC)


@pytest.mark.parametrize("kind", ["selected", "selection_failed", "ended"])
def test_what_is_settled_stays_so(kind: str) -> None:
    assert decide(SPEC, {kind}) == Settled(kind)


def test_a_selection_is_named_before_the_end() -> None:
    assert decide(SPEC, {"ended", "selected"}) == Settled("selected")


def test_a_run_under_newer_rules_is_left_to_newer_programs() -> None:
    newer = RunSpec(run="medical", protocol_version=PROTOCOL_VERSION + 1)
    with pytest.raises(Invalid, match="upgrade"):
        decide(newer, set())
    assert decide(newer, {"selected"}) == Settled("selected")
