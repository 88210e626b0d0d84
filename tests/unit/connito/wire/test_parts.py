"""No message of the log grows with those who take part: what is said of many lies in parts in front of the fact."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from connito.audit.evidence import read, signatures
from connito.errors import Invalid
from connito.v1 import cycle_pb2 as c
from connito.v1 import reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.v1.envelope_pb2 import Envelope, FactPart
from connito.wire.envelope import MAX_ENVELOPE_BYTES, seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.parts import MAX_FACT_BYTES, PART_BYTES, limit_of, split
from connito.wire.roster import Roster
from connito.wire.subjects import fact, parse_part, part
from connito.wire.verification import CATALOGUE, LARGE, verify_fact
from google.protobuf.message import Message

RUN = "r"
ROLES = ("a", "b", "coordinator", "committer", "selector", "aggregator")
KEYS = {role: Identity.generate(role.encode().ljust(32, b".")) for role in ROLES}
VALIDATORS = ("a", "b")
ROSTER = Roster(
    {name: frozenset({key.public}) for name, key in KEYS.items() if name not in VALIDATORS}
    | {"validator": frozenset(KEYS[name].public for name in VALIDATORS)}
)
MINERS, JUDGES = 100_000, 1_000


def key(kind: str, number: int) -> str:
    return f"U{kind}{number:054d}"


def written(who: str, section: str, kind: str, message: Message, id_: str = "", *, first: int = 1) -> list[Record]:
    """What the broker stores when a fact is published."""
    subject = fact(RUN, section, 0 if section == "run" else 1, kind, id_)
    parts, head = split(subject, seal(KEYS[who], subject, message))
    stored = [(place, seal(KEYS[who], place, piece)) for place, piece in parts] + [(subject, head)]
    return [
        Record(section.upper(), first + place, name, envelope.SerializeToString(), 0)
        for place, (name, envelope) in enumerate(stored)
    ]


def submission(number: int) -> c.Submission:
    ref = ArtifactRef(
        digest=f"{number:064x}", size=1 << 40, media_type="application/vnd.safetensors", realm=REALM_SUBMISSION
    )
    return c.Submission(
        miner=key("M", number),
        artifact=ref,
        commit_sequence=number,
        reveal_sequence=number,
        origin_cycle=1,
        base_state=ref,
    )


def verdict(number: int) -> c.Verdict:
    found = c.Finding(kind=c.FINDING_KIND_UNCERTAIN_GAIN, effect=0.1, low=-0.1, high=0.3, sequences=64)
    return c.Verdict(miner=key("M", number), status=c.VERDICT_STATUS_SCORED, reason=reasons_pb2.REASON_OUTLIER, utility=0.1,
                     rank=number, reward=1 << 40, weight=0.1, origin_cycle=1, withheld=1, finding=found)  # fmt: skip


def growing(miners: int, judges: int) -> Iterator[tuple[str, str, str, Message]]:
    """Every kind of fact that says something of all who take part, at a size."""
    names, validators = [key("M", n) for n in range(miners)], [key("V", n) for n in range(judges)]
    who: dict[str, Any] = {"run": RUN, "cycle": 1}
    for window in ("train", "commit", "submit", "validate", "merge"):
        yield "coordinator", window, "opened", c.WindowOpened(**who, expected=[*names, *validators])
        yield "coordinator", window, "closed", c.WindowClosed(**who, banned=names)
    yield "committer", "commit", "settled", c.WindowSettled(**who, committed=names)
    yield "committer", "submit", "settled", c.WindowSettled(**who, submissions=map(submission, range(miners)))
    yield (
        "coordinator",
        "validate",
        "drawn",
        c.SeedDrawn(**who, seed=b"s" * 32, validators=validators, omitted=validators),
    )
    standings = [c.MinerStanding(miner=name, mu=25.0, sigma=8.0, judged=9, useful=9) for name in names]
    trusted = [c.ValidatorStanding(validator=name, reported=True, trust=1.0, weight=1.0, reward=1, bonds=[0.5] * (miners // 1000))
               for name in validators]  # fmt: skip
    yield (
        "aggregator",
        "merge",
        "scored",
        c.CycleScored(**who, verdicts=map(verdict, range(miners)), validators=trusted, bonded=names, miners=standings),
    )
    yield "aggregator", "merge", "version", c.VersionPublished(**who, version=1, merged=names, weights=[0.1] * miners)
    spec = run_pb2.RunSpec(run=RUN)
    spec.enrolment.allowed.extend(names[:10_000])
    yield "coordinator", "run", "created", run_pb2.RunCreated(spec=spec)


@pytest.mark.parametrize(
    ("miners", "judges"), [(2_000, 100), pytest.param(MINERS, JUDGES, marks=pytest.mark.slow, id="goal")]
)
def test_no_message_is_larger_with_any_number_of_miners(miners: int, judges: int) -> None:
    log = Log(ROSTER)
    for who, section, kind, message in growing(miners, judges):
        records = written(who, section, kind, message)
        assert max(len(record.data) for record in records) <= MAX_FACT_BYTES, kind
        assert len(records[-1].data) < 1000 or len(records) == 1, kind
        found = [log.apply(record) for record in records]
        assert found[:-1] == [None] * (len(records) - 1)
        assert found[-1] is not None
        assert found[-1].message == message, kind
    assert log.parts.waiting == {}


def test_every_field_that_names_those_who_take_part_is_in_a_kind_that_may_be_large() -> None:
    """A kind of fact with a list that nothing bounds is carried in parts, or its author has to bound it."""
    bounded = {
        ("train", "seed"),  # anchors, at most 64
        ("library", "benchmarked"),  # scores and what has none, at most 120 of each
        ("library", "deposited"),  # parents: one
        ("run", "head"),  # cuts: one a stream
    }
    listed = {
        place for place, (of, _, _) in CATALOGUE.items() if any(field.is_repeated for field in of.DESCRIPTOR.fields)
    }
    assert listed - bounded <= LARGE


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_bound_is_exact(extra: int) -> None:
    assert MAX_FACT_BYTES == 64 * 1024
    subject = fact(RUN, "merge", 1, "scored")
    probe = seal(KEYS["aggregator"], subject, c.CycleScored(run=RUN, cycle=1, bonded=["x" * 60_000])).ByteSize()
    message = c.CycleScored(run=RUN, cycle=1, bonded=["x" * (60_000 + MAX_FACT_BYTES - probe + extra)])
    records = written("aggregator", "merge", "scored", message)
    assert (len(records) == 1) == (extra <= 0)
    assert max(len(record.data) for record in records) <= MAX_FACT_BYTES


LARGE_ONE = c.CycleScored(run=RUN, cycle=1, bonded=[key("M", n) for n in range(3000)])


def large() -> list[Record]:
    records = written("aggregator", "merge", "scored", LARGE_ONE)
    assert len(records) == 4
    return records


def applied(records: list[Record], roster: Roster = ROSTER) -> c.CycleScored | None:
    """The result that a reader ends up with, whatever it refuses on the way."""
    log = Log(roster)
    for record in records:
        try:
            log.apply(record)
        except Invalid:
            continue
    return log.runs[RUN].scored(1) if RUN in log.runs else None


def test_a_fact_in_parts_is_the_fact() -> None:
    assert applied(large()) == LARGE_ONE
    evidence = read(RUN, large(), ROSTER)
    assert signatures(evidence).differences == ()
    assert evidence.facts.scored(1) == LARGE_ONE
    subject = fact(RUN, "merge", 1, "scored")
    whole = Record("MERGE", 4, subject, evidence.joined[subject], 0)
    assert verify_fact(whole, ROSTER).message == LARGE_ONE


@pytest.mark.parametrize("gone", range(3))
def test_a_fact_without_one_of_its_parts_is_none(gone: int) -> None:
    records = large()
    del records[gone]
    assert applied(records) is None
    assert [difference.where for difference in signatures(read(RUN, records, ROSTER)).differences] == [
        "merge.1.scored (MERGE 4)"
    ]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_flipped_bit_anywhere_leaves_no_fact(place: int, at: float) -> None:
    records = large()
    data = bytearray(records[place].data)
    data[int(len(data) * at)] ^= 1
    records[place] = replace(records[place], data=bytes(data))
    assert applied(records) is None


def test_parts_behind_their_fact_are_not_read() -> None:
    *parts, head = large()
    assert applied([head, *parts]) is None


def test_parts_may_come_twice_and_between_others() -> None:
    first, second, third, head = large()
    other = written(
        "committer", "submit", "settled", c.WindowSettled(run=RUN, cycle=1, submissions=map(submission, range(900)))
    )
    assert applied([first, other[0], second, first, *other[1:], third, head]) == LARGE_ONE


def test_what_a_writer_that_died_left_behind_does_not_matter() -> None:
    left = written(
        "aggregator", "merge", "scored", c.CycleScored(run=RUN, cycle=1, bonded=[key("X", n) for n in range(3000)])
    )
    assert applied([*left[:-1], *large()]) == LARGE_ONE


def test_a_part_with_other_content_is_no_part_of_the_fact() -> None:
    records = large()
    place = records[1].subject
    other = seal(KEYS["aggregator"], place, FactPart(data=b"x" * PART_BYTES)).SerializeToString()
    records[1] = replace(records[1], data=other)
    assert applied(records) is None


def test_nobody_else_writes_a_part() -> None:
    records = large()
    stranger = Identity.generate()
    for who in (KEYS["coordinator"], KEYS["a"], stranger):
        forged = [
            replace(record, data=seal(who, record.subject, Envelope.FromString(record.data)).SerializeToString())
            for record in records[:-1]
        ]
        assert applied([*forged, records[-1]]) is None
        assert applied([*forged, *records]) == LARGE_ONE


def test_a_squatter_without_authority_does_not_use_the_parts_up() -> None:
    *parts, head = large()
    squat = seal(Identity.generate(), head.subject, LARGE_ONE).SerializeToString()[:MAX_FACT_BYTES]
    assert applied([*parts, replace(head, data=squat), head]) == LARGE_ONE


def report(validator: str, words: int) -> c.ScoreReport:
    scores = [c.SubmissionScore(miner=key("M", n), detail="x" * 1000) for n in range(words)]
    return c.ScoreReport(run=RUN, cycle=1, validator=KEYS[validator].public, scores=scores)


def test_a_validators_parts_are_its_own_and_bounded() -> None:
    public = KEYS["a"].public
    log = Log(ROSTER)
    for record in written("a", "validate", "report", report("a", 200), public):
        log.apply(record)
    assert len(log.runs[RUN].reports(1)[public].message.scores) == 200
    with pytest.raises(Invalid, match="over the limit"):
        written("a", "validate", "report", report("a", 1100), public)
    log = Log(ROSTER)
    with pytest.raises(Invalid, match="itself"):
        log.apply(written("a", "validate", "report", report("b", 200), KEYS["b"].public)[0])
    for number in range(2 * MAX_ENVELOPE_BYTES // PART_BYTES):
        log.apply(_piece(number))
    with pytest.raises(Invalid, match="more parts"):
        log.apply(_piece(99))


def test_parts_without_their_facts_do_not_pile_up() -> None:
    """A validator may name any cycle: 60 kB for each of them stayed in every reader for good."""
    log, public = Log(ROSTER), KEYS["a"].public
    for cycle in range(1, 50):
        log.apply(_piece(cycle, fact(RUN, "validate", cycle, "report", public)))
    assert list(log.parts.waiting) == [fact(RUN, "validate", 49, "report", public)]
    for record in written("a", "validate", "report", report("a", 200), public):
        log.apply(record)
    assert len(log.runs[RUN].reports(1)[public].message.scores) == 200


def _piece(number: int, subject: str = "") -> Record:
    place = part(subject or fact(RUN, "validate", 1, "report", KEYS["a"].public), f"{number:064x}", 0)
    data = seal(KEYS["a"], place, FactPart(data=random.randbytes(PART_BYTES)))
    return Record("VALIDATE", number + 1, place, data.SerializeToString(), 0)


@pytest.mark.parametrize("kind", ["seed", "paused"])
def test_a_kind_that_has_no_parts_takes_none(kind: str) -> None:
    section = "run" if kind == "paused" else "validate"
    with pytest.raises(Invalid, match="no parts"):
        Log(ROSTER).apply(_piece(0, fact(RUN, section, 1, kind, KEYS["a"].public)))


@pytest.mark.parametrize(
    "tail", ["part.x.0", "part.ABC.0", f"part.{'0' * 64}.00", f"part.{'0' * 64}.-1", f"part.{'0' * 63}.0"]
)
def test_what_only_looks_like_a_part_is_refused(tail: str) -> None:
    with pytest.raises(Invalid):
        parse_part(f"connito.v1.r.merge.1.scored.{tail}")


def test_an_envelope_has_a_payload_or_its_digest() -> None:
    *parts, head = large()
    both = Envelope.FromString(head.data)
    both.payload = b"x"
    short = Envelope.FromString(head.data)
    short.payload_digest = short.payload_digest[:31]
    endless = Envelope.FromString(head.data)
    endless.payload_parts = 1 << 31
    for broken in (both, short, endless):
        assert applied([*parts, replace(head, data=broken.SerializeToString())]) is None


def test_limits_are_of_the_author() -> None:
    assert limit_of(fact(RUN, "validate", 1, "report", "U")) == MAX_ENVELOPE_BYTES
    assert limit_of(fact(RUN, "merge", 1, "scored")) > 100 * MAX_ENVELOPE_BYTES
