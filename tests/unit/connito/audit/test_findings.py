"""Outcomes are data: their words may be anything, and whoever changes a field and signs it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from connito.audit.audit import Audit, Options, audit
from connito.audit.differences import Difference
from connito.audit.recompute import Recomputation, merge
from connito.errors import Invalid
from connito.protocol.findings import PROTOCOL_VERSION, Outcome
from connito.protocol.policy.law import fill
from connito.v1 import cycle_pb2 as c
from connito.v1 import run_pb2
from connito.v1.cycle_pb2 import Finding
from connito.v1.envelope_pb2 import Envelope
from connito.v1.run_pb2 import RewardPolicy
from connito.views import sentences
from google.protobuf.message import Message

from tests.unit.connito.audit.world import World, distance, tell

POLICY = RewardPolicy(payout="proportional", bond_rate=0.1, validator_share=0.1, probation_cycles=1, probation_pay=0.5)
SPOKEN: dict[str, type[Message]] = {
    **{f"validate.{cycle}.report.{{v{name}}}": c.ScoreReport for cycle in (1, 2) for name in "123"},
    **{f"merge.{cycle}.scored": c.CycleScored for cycle in (1, 2)},
    **{f"merge.{cycle}.version": c.VersionPublished for cycle in (1, 2)},
}


@pytest.fixture(scope="module")
def current(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("findings"), POLICY)


async def look(world: World, folder: Path) -> list[Difference]:
    evidence, artifacts = world.evidence(), await world.artifacts(folder)
    found: Audit = audit(evidence, artifacts, Options(model=False, tolerance=0.0))
    work = Recomputation(evidence, artifacts, 0.0, measure=distance)
    return [*found.differences, *(odd for cycle in (1, 2) for odd in merge(work, cycle).differences)]


def read(world: World, ending: str) -> Message:
    envelope = Envelope.FromString(world.records[world.find(ending)].data)
    return SPOKEN[ending].FromString(envelope.payload)


def outcomes_of(message: Message) -> Iterator[Outcome]:
    """The outcomes in a fact's payload: itself, or those of a report or of a cycle's result."""
    if isinstance(message, c.ScoreReport):
        yield from message.scores
    elif isinstance(message, c.CycleScored):
        yield from message.verdicts
        yield from message.validators
    else:
        assert isinstance(message, c.VersionPublished)
        yield message


def findings_of(message: Message) -> Iterator[Finding]:
    for outcome in outcomes_of(message):
        if outcome.HasField("finding"):
            yield outcome.finding
            yield from outcome.finding.parts


async def test_reworded_sentences_leave_an_audit_at_same(
    current: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reword(message: Message) -> None:
        for outcome in outcomes_of(message):
            if isinstance(outcome, c.VersionPublished):
                outcome.gate_detail = "dit heeft iemand herschreven"
            else:
                outcome.detail = "dit heeft iemand herschreven"
        for finding in findings_of(message):
            finding.text = "dit ook"

    world = current.copy()
    assert await look(world, tmp_path) == []
    for ending, kind in SPOKEN.items():
        world.resign(ending, reword, kind)
    monkeypatch.setattr(sentences, "SENTENCES", dict.fromkeys(sentences.SENTENCES, "anders gezegd"))

    # The expert's attestation holds the envelope of its version, which was signed again; and heads cover every byte.
    assert [odd for odd in await look(world, tmp_path) if odd.check not in ("expert", "heads")] == []


def _other(finding: Finding, name: str) -> None:
    value = getattr(finding, name)
    if name == "parts":
        finding.parts.pop()
    elif name == "miners":
        finding.miners.append("somebody")
    elif isinstance(value, str):
        setattr(finding, name, value + "x")
    else:
        setattr(finding, name, value + 1)


def _tamper(kind: int, field: str) -> Callable[[Message], None]:
    def change(message: Message) -> None:
        _other(next(finding for finding in findings_of(message) if finding.kind == kind), field)

    return change


async def test_every_field_of_every_finding_is_compared(current: World, tmp_path: Path) -> None:
    places = {
        (finding.kind, descriptor.name): (ending, message_type)
        for ending, message_type in SPOKEN.items()
        for finding in findings_of(read(current, ending))
        for descriptor, _ in finding.ListFields()
        if descriptor.name != "text"
    }
    kinds = {kind for kind, _ in places}
    assert {c.FINDING_KIND_COPY, c.FINDING_KIND_GAIN, c.FINDING_KIND_PROBATION} <= kinds
    missed = []
    for (kind, field), (ending, message_type) in places.items():
        world = current.copy()
        world.resign(ending, _tamper(kind, field), message_type)
        if not [odd for odd in await look(world, tmp_path) if odd.check in ("reports", "verdicts", "merge")]:
            missed.append((c.FindingKind.Name(kind), field))
    assert missed == []


@pytest.mark.parametrize(("version", "why"), [(PROTOCOL_VERSION + 1, "upgrade"), (2, "before the first release")])
async def test_rules_that_the_auditor_does_not_know_are_refused(
    current: World, tmp_path: Path, version: int, why: str
) -> None:
    def other(created: run_pb2.RunCreated) -> None:
        created.spec.protocol_version = version

    world = current.copy()
    world.resign("run.0.created", other, run_pb2.RunCreated)

    with pytest.raises(Invalid, match=why):
        await look(world, tmp_path)


def test_every_kind_has_a_sentence() -> None:
    kinds = set(c.FindingKind.values()) - {c.FINDING_KIND_UNSPECIFIED}
    assert set(sentences.SENTENCES) == kinds
    for kind in kinds:
        assert sentences.sentence(Finding(kind=kind)) or kind == c.FINDING_KIND_GATE_REFUSALS


@pytest.mark.parametrize("asked", [0, PROTOCOL_VERSION + 5])
def test_the_coordinator_says_which_rules_a_new_run_is_under(asked: int) -> None:
    spec = run_pb2.RunSpec(run="r", protocol_version=asked)
    fill(spec)
    assert spec.protocol_version == PROTOCOL_VERSION
