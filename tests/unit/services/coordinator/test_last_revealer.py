"""The one who reveals last knows every other secret. All that it can do with that is to reveal, or to lose its seat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from connito.protocol.beacon import draw_seed, secret_digest
from connito.protocol.scoring import trust
from connito.protocol.scoring.consensus import Consensus
from connito.protocol.scoring.counted_reports import read_reports
from connito.v1 import cycle_pb2, reasons_pb2
from connito.wire.facts import RunFacts

from services.coordinator.handlers import decide
from tests.support.run import RUN, even, secret_of
from tests.unit.services.coordinator.test_handlers import fresh_at, to_window
from tests.unit.services.coordinator.world import World

OTHERS, LAST = ("va", "vb"), "vc"
EVERYBODY = (*OTHERS, LAST)


def before_the_last(min_validators: int = 2) -> World:
    """Every secret but the last one's is in the log."""
    world = World(min_miners=1, min_validators=min_validators)
    world.created()
    world.selected()
    world.miners("ma")
    for validator in EVERYBODY:
        world.validators(validator)
    to_window(world, "validate", 1)
    world = fresh_at(world, "validate")
    spec = world.facts.spec
    assert spec is not None
    spec.windows.min_validators = min_validators
    for validator in OTHERS:
        world.seed_revealed(validator, 1)
    return world


def finish(world: World) -> cycle_pb2.SeedDrawn | None:
    """Let time pass until the seed is drawn, or until the window closed without one."""
    for _ in range(20):
        drawn = world.facts.drawn(1)
        if drawn is not None or world.facts.window("validate", 1).closed is not None:
            return drawn
        decision = decide(world.facts, world.now, even)
        world.perform(decision)
        world.now = decision.wake_at_ms or world.now
    raise AssertionError("no draw and no close")


def seed_of(*validators: str) -> bytes:
    return draw_seed(RUN, 1, {validator: secret_of(validator, 1) for validator in validators})


def grind(world: World) -> None:
    """Look for a secret whose seed is liked, now that all others are known."""
    wanted = next(
        value
        for number in range(10_000)
        if draw_seed(RUN, 1, {**{v: secret_of(v, 1) for v in OTHERS}, LAST: (value := b"%032d" % number)})[0] == 0
    )
    world.seed_revealed(LAST, 1, wanted)


def commit_again(world: World) -> None:
    """Another commitment, to a secret chosen now: its place in the log is taken."""
    message = cycle_pb2.SeedCommitted(run=RUN, cycle=1, validator=LAST, digest=secret_digest(RUN, 1, LAST, b"y" * 32))
    assert not world.publish("train", 1, "seed", message, LAST)
    world.seed_revealed(LAST, 1, b"y" * 32)


def wait_for_the_draw(world: World) -> None:
    """Reveal once the seed without it is known."""
    assert finish(world) is not None
    world.seed_revealed(LAST, 1)


def wrong_then_right(world: World) -> None:
    """Take a wrong secret back."""
    world.seed_revealed(LAST, 1, b"x" * 32)
    world.seed_revealed(LAST, 1)


DEEDS: list[tuple[Callable[[World], object], bool]] = [
    (lambda world: world.seed_revealed(LAST, 1), True),
    (lambda world: None, False),
    (lambda world: world.seed_revealed(LAST, 1, b"x" * 32), False),
    (lambda world: world.seed_revealed(LAST, 1, b""), False),
    (lambda world: world.seed_revealed(LAST, 1, secret_of(OTHERS[0], 1)), False),
    (grind, False),
    (commit_again, False),
    (wait_for_the_draw, False),
    (wrong_then_right, False),
]


@pytest.mark.parametrize(("deed", "seated"), DEEDS)
def test_whatever_the_last_one_does_there_are_two_seeds_and_one_of_them_costs_its_seat(
    deed: Callable[..., Any], seated: bool
) -> None:
    world = before_the_last()
    deed(world)
    drawn = finish(world)
    assert drawn is not None
    assert drawn.seed == (seed_of(*EVERYBODY) if seated else seed_of(*OTHERS))
    assert (LAST in drawn.validators, LAST in drawn.omitted) == (seated, not seated)


def test_without_its_seat_its_report_does_not_count_and_it_loses_weight() -> None:
    world = before_the_last()
    drawn = finish(world)
    assert drawn is not None
    for validator in EVERYBODY:
        report = cycle_pb2.ScoreReport(
            run=RUN, cycle=1, validator=validator, seed=drawn.seed, state_digest=_state(world.facts)
        )
        world.publish("validate", 1, "report", report, validator)
    found = read_reports(world.facts, 1)
    assert set(found.counted) == set(OTHERS)
    kinds = {validator: refusal.finding.kind for validator, refusal in found.ignored.items()}
    assert kinds == {LAST: cycle_pb2.FINDING_KIND_REPORT_NOT_DRAWN}
    spec = world.facts.spec
    assert spec is not None
    spec.rewards.bond_rate = 0.1
    standings = [cycle_pb2.ValidatorStanding(validator=v, reported=v != LAST) for v in EVERYBODY]
    agreed = Consensus({}, {}, standings, claims={v: {} for v in OTHERS})
    found_standings, _ = trust.stand(world.facts, 1, agreed, [], 0)
    assert {s.validator: s.trust for s in found_standings} == {"va": 1.0, "vb": 1.0, LAST: 0.9}
    assert found_standings[-1].reason == reasons_pb2.REASON_SEED_WITHHELD


def _state(facts: RunFacts) -> str:
    opened = facts.window("train", 1).opened
    assert opened is not None
    return opened.state.digest


def test_where_the_quorum_needs_everybody_silence_costs_the_cycle_and_chooses_no_seed() -> None:
    """Why a quorum is chosen below the number of validators: here the last one can void the cycle, at the same price."""
    world = before_the_last(min_validators=3)
    assert finish(world) is None
    assert world.facts.window("validate", 1).closed is not None
