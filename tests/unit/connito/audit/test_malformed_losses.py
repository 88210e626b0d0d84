"""Losses that no gate publishes are a difference by name, of the version that has them and of no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from connito.audit.audit import Options, audit
from connito.protocol.merging.gate import Rule
from connito.v1 import cycle_pb2 as c

from tests.unit.connito.audit.world import TARGET, World, tell

# The checks that cover every byte, or the words of another: they differ with whatever is signed again.
OF_THE_BYTES = {"heads", "receipts", "expert", "versions"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


def _none(loss: c.DomainLoss) -> None:
    loss.tokens = 0
    for field in ("before_sums", "after_sums", "sequence_tokens"):
        loss.ClearField(field)


def _lowest(loss: c.DomainLoss, change: Callable[[c.DomainLoss], object]) -> None:
    """As the best version, which later ones are held to."""
    loss.after = 1e-9
    change(loss)


MALFORMED: dict[str, tuple[Callable[[c.DomainLoss], object], str]] = {
    "no tokens": (_none, "of no tokens"),
    "too few before": (lambda loss: loss.before_sums.pop(), "1 sums before, 2 after and 2 token counts"),
    "too few after": (lambda loss: loss.after_sums.pop(), "2 sums before, 1 after and 2 token counts"),
    "too many counts": (lambda loss: loss.sequence_tokens.append(1), "2 sums before, 2 after and 3 token counts"),
    "no counts": (lambda loss: loss.ClearField("sequence_tokens"), "2 sums before, 2 after and 0 token counts"),
    "an empty sequence": (lambda loss: loss.sequence_tokens.__setitem__(0, 0), "a sequence without tokens"),
    "other tokens": (lambda loss: loss.sequence_tokens.__setitem__(0, 9), "sequences of 12 tokens, in all 7"),
    "no number": (lambda loss: loss.after_sums.__setitem__(0, math.nan), "not finite"),
    "both infinities": (lambda loss: loss.after_sums.__setitem__(slice(None), [math.inf, -math.inf]), "not finite"),
    "too large": (lambda loss: loss.after_sums.__setitem__(slice(None), [1e308, 1e308]), "not finite"),
    "endless": (lambda loss: setattr(loss, "before", -math.inf), "not finite"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_version_is_named_and_later_cycles_are_audited(
    name: str, told: World, tmp_path: Path
) -> None:
    change, why = MALFORMED[name]
    world = told.copy()
    world.resign("merge.1.version", lambda version: _lowest(version.gate_losses[0], change), c.VersionPublished)
    found = audit(world.evidence(), await world.artifacts(tmp_path), Options(model=False, tolerance=0.0))

    gate = [(one.cycle, one.where, one.what, one.by) for one in found.differences if one.check == "gate"]
    what = f"losses that no gate publishes: {TARGET}: {why}"
    assert gate == [(1, "merge.1.version", what, "operator")]
    assert not [one for one in found.differences if one.cycle == 2 and one.check not in OF_THE_BYTES]
    assert found.blame == ["operator"]


async def test_a_domain_given_twice_is_named(told: World, tmp_path: Path) -> None:
    def again(version: c.VersionPublished) -> None:
        _none(version.gate_losses.add(domain=TARGET))

    world = told.copy()
    world.resign("merge.1.version", again, c.VersionPublished)
    found = audit(world.evidence(), await world.artifacts(tmp_path), Options(model=False, tolerance=0.0))
    gate = [(one.cycle, one.what) for one in found.differences if one.check == "gate"]
    assert gate == [(1, f"losses that no gate publishes: {TARGET}: given twice")]


def test_an_incumbent_that_stayed_is_looked_at_too(told: World) -> None:
    from connito.audit.judging import gate

    def stay(version: c.VersionPublished) -> None:
        version.ClearField("merged")
        version.gate_losses[0].before_sums.pop()

    def no_number(version: c.VersionPublished) -> None:
        version.ClearField("merged")
        version.gate_losses[0].before = math.nan

    world = told.copy()
    world.resign("merge.1.version", stay, c.VersionPublished)
    assert [one.by for one in gate(world.evidence(), 1).differences] == ["operator"]
    world = told.copy()
    world.resign("merge.1.version", no_number, c.VersionPublished)
    assert gate(world.evidence(), 1).note == "the incumbent stayed"


@pytest.mark.parametrize("name", MALFORMED)
def test_no_later_version_is_held_to_malformed_losses(name: str, told: World) -> None:
    world = told.copy()
    change = MALFORMED[name][0]
    world.resign("merge.1.version", lambda version: _lowest(version.gate_losses[0], change), c.VersionPublished)
    best = Rule.of(world.evidence().facts, 2).best
    assert best is None or all(map(math.isfinite, best.per_token().values()))
    assert best is None or best.per_token()[TARGET] > 1e-9
