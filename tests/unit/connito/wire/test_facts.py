"""What becomes a fact, and that the order in which facts arrive does not matter."""

from __future__ import annotations

from typing import Any

import pytest
from connito.errors import Invalid
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire import subjects
from connito.wire.envelope import seal
from connito.wire.fact import Fact, MissingFactError, Record
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import OPERATOR, ROLES, Roster
from connito.wire.subjects import FactKey
from connito.wire.verification import ANY, CATALOGUE, WORKERS, verify_fact, verify_ingress
from hypothesis import given
from hypothesis import strategies as st

PEOPLE = {role: Identity.generate(role.encode().ljust(32)) for role in (*ROLES, "miner")}
ROSTER = Roster({role: frozenset({PEOPLE[role].public}) for role in ROLES})
RUN = "r1"


def record(
    signer: str,
    section: str,
    cycle: int,
    kind: str,
    message: Any,
    id_: str = "",
    sequence: int = 1,
    stream: str = "TRAIN",
) -> Record:
    subject = subjects.fact(RUN, section, cycle, kind, id_)
    return Record(stream, sequence, subject, seal(PEOPLE[signer], subject, message).SerializeToString(), 0)


def said(
    signer: str, miner: str, kind: str, message: cycle_pb2.Commitment | cycle_pb2.Reveal, sequence: int = 1
) -> Record:
    subject = subjects.ingress(RUN, PEOPLE[miner].public, kind)
    return Record("INGRESS", sequence, subject, seal(PEOPLE[signer], subject, message).SerializeToString(), 0)


def opened(cycle: int = 1, version: Any = 0) -> cycle_pb2.WindowOpened:
    return cycle_pb2.WindowOpened(run=RUN, cycle=cycle, window=cycle_pb2.WINDOW_TRAIN, version=version)


def test_every_kind_of_fact_has_a_role_of_the_roster() -> None:
    assert {role for _, role, _ in CATALOGUE.values()} <= {*ROLES, OPERATOR, ANY}
    assert set(WORKERS) <= set(ROLES)


def test_a_good_fact() -> None:
    fact = verify_fact(record("coordinator", "train", 1, "opened", opened(), sequence=7), ROSTER)
    assert (fact.run, fact.key.cycle, fact.signer, fact.sequence) == (RUN, 1, PEOPLE["coordinator"].public, 7)


@pytest.mark.parametrize("role", [role for role in PEOPLE if role != "coordinator"])
def test_only_its_role_may_write_it(role: str) -> None:
    with pytest.raises(Invalid, match="only a coordinator") as caught:
        verify_fact(record(role, "train", 1, "opened", opened()), ROSTER)
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED


@pytest.mark.parametrize(
    "message", [cycle_pb2.WindowOpened(run="other", cycle=1), cycle_pb2.WindowOpened(run=RUN, cycle=2)]
)
def test_payload_and_subject_agree_on_run_and_cycle(message: cycle_pb2.WindowOpened) -> None:
    with pytest.raises(Invalid, match="another run or cycle"):
        verify_fact(record("coordinator", "train", 1, "opened", message), ROSTER)


def test_payload_and_subject_agree_on_the_id() -> None:
    message = cycle_pb2.CommitmentAccepted(run=RUN, cycle=1, miner="somebody")
    with pytest.raises(Invalid, match="another id"):
        verify_fact(record("committer", "commit", 1, "accepted", message, "else"), ROSTER)
    refused = cycle_pb2.Refused(run=RUN, cycle=1, miner="m", ingress_sequence=9)
    assert verify_fact(record("committer", "commit", 1, "refused", refused, "m-9"), ROSTER).key.id == "m-9"


def test_the_run_of_a_creation_is_in_its_spec() -> None:
    created = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=RUN))
    assert verify_fact(record("coordinator", "run", 0, "created", created, stream="RUNS"), ROSTER).run == RUN


def test_a_validator_speaks_for_itself_only() -> None:
    second = Identity.generate(b"second".ljust(32))
    roster = Roster({"validator": frozenset({PEOPLE["validator"].public, second.public})})
    message = cycle_pb2.SeedCommitted(run=RUN, cycle=1, validator=second.public)
    with pytest.raises(Invalid, match="itself") as caught:
        verify_fact(record("validator", "train", 1, "seed", message, second.public), roster)
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED


def test_a_kind_that_does_not_exist() -> None:
    with pytest.raises(Invalid, match=r"train\.lunch") as caught:
        verify_fact(record("coordinator", "train", 1, "lunch", opened()), ROSTER)
    assert caught.value.reason == reasons_pb2.REASON_UNKNOWN_TYPE


def test_a_miner_speaks_for_itself_only() -> None:
    commitment = cycle_pb2.Commitment(run=RUN, cycle=2, digest=b"x" * 32)
    assert verify_ingress(said("miner", "miner", "commitment", commitment)).key.cycle == 2
    with pytest.raises(Invalid, match="another key") as caught:
        verify_ingress(said("validator", "miner", "commitment", commitment))
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("commitment", cycle_pb2.Commitment(run="other", cycle=2)),
        ("commitment", cycle_pb2.Reveal(run=RUN, cycle=2)),
        ("gossip", cycle_pb2.Commitment(run=RUN, cycle=2)),
    ],
)
def test_other_things_said_are_refused(kind: str, message: cycle_pb2.Commitment | cycle_pb2.Reveal) -> None:
    with pytest.raises(Invalid):
        verify_ingress(said("miner", "miner", kind, message))


RECORDS = [
    *(record("coordinator", "train", cycle, "opened", opened(cycle), sequence=cycle) for cycle in (1, 2, 3)),
    # A second message on a subject, and a second thing said: the smaller sequence stands.
    record("coordinator", "train", 1, "opened", opened(1, version=9), sequence=8),
    said("miner", "miner", "commitment", cycle_pb2.Commitment(run=RUN, cycle=1, digest=b"first"), sequence=4),
    said("miner", "miner", "commitment", cycle_pb2.Commitment(run=RUN, cycle=1, digest=b"second"), sequence=5),
    record("committer", "commit", 1, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=1), stream="COMMIT"),
    record("aggregator", "merge", 1, "version", cycle_pb2.VersionPublished(run=RUN, cycle=1), stream="MERGE"),
]


@given(st.lists(st.sampled_from(RECORDS)).flatmap(lambda extra: st.permutations(RECORDS + extra)))
def test_order_and_repetition_do_not_matter(records: list[Record]) -> None:
    log = Log(ROSTER)
    for each in records:
        log.apply(each)
    facts = log.runs[RUN]
    assert len(facts.facts) == 6
    assert facts.window("train", 1).require_opened().version == 0
    first = facts.fact("ingress", 1, "commitment", PEOPLE["miner"].public)
    assert first is not None
    assert isinstance(first.message, cycle_pb2.Commitment)
    assert first.message.digest == b"first"
    assert facts.cycle == 3
    assert facts.window("commit", 1).settled is not None
    assert facts.version(1) is not None


def test_applying_tells_what_was_new() -> None:
    log = Log(ROSTER)
    assert log.apply(RECORDS[0]) is not None
    assert log.apply(RECORDS[0]) is None


def test_inside_is_decided_by_sequence() -> None:
    log = Log(ROSTER)
    inside, outside = (
        log.apply(said("miner", "miner", kind, message, sequence))
        for kind, message, sequence in (
            ("commitment", cycle_pb2.Commitment(run=RUN, cycle=1), 10),
            ("reveal", cycle_pb2.Reveal(run=RUN, cycle=1), 11),
        )
    )
    facts = log.runs[RUN]
    assert inside is not None
    assert outside is not None
    assert facts.window("commit", 1).inside(outside)
    closed = cycle_pb2.WindowClosed(
        run=RUN, cycle=1, window=cycle_pb2.WINDOW_COMMIT, stream="INGRESS", last_sequence=10
    )
    log.apply(record("coordinator", "commit", 1, "closed", closed, stream="COMMIT", sequence=99))
    assert facts.window("commit", 1).inside(inside)
    assert not facts.window("commit", 1).inside(outside)


def test_an_unknown_run_is_empty() -> None:
    facts = RunFacts("none")
    assert (facts.spec, facts.selection, facts.ended, facts.cycle, facts.miners) == (None, None, None, 0, [])


def of_cycle(cycle: int, *windows: str) -> RunFacts:
    facts = RunFacts(RUN)
    for sequence, window in enumerate(windows, 1):
        name, kind = window.split(".")
        message: cycle_pb2.WindowOpened | cycle_pb2.WindowClosed
        if kind == "opened":
            message = cycle_pb2.WindowOpened(cycle=cycle, deadline_unix_ms=sequence)
        else:
            message = cycle_pb2.WindowClosed(cycle=cycle, stream="INGRESS", last_sequence=5)
        facts.add(Fact(RUN, FactKey(name, cycle, kind), message, "C", name.upper(), sequence, sequence))
    return facts


def test_a_fact_that_is_required_is_named_when_it_is_missing() -> None:
    facts = RunFacts(RUN)
    with pytest.raises(MissingFactError, match=f"run {RUN} has no specification yet"):
        facts.require_spec()
    with pytest.raises(MissingFactError, match="no close of submit in cycle 3 yet"):
        facts.window("submit", 3).require_closed()


def test_the_open_window_is_the_last_one_that_was_opened_and_not_closed() -> None:
    assert RunFacts(RUN).open_window is None
    window = of_cycle(1, "train.opened").open_window
    assert window is not None
    assert (window.name, window.cycle, window.deadline_unix_ms) == ("train", 1, 1)
    assert of_cycle(1, "train.opened", "train.closed").open_window is None
    later = of_cycle(1, "train.opened", "train.closed", "commit.opened").open_window
    assert later is not None
    assert later.name == "commit"


def test_the_current_cycle_waits_for_every_cycle_before_it() -> None:
    facts = of_cycle(2, "train.opened")
    assert facts.cycle == 0
    first = of_cycle(1, "train.opened")
    facts.add(next(iter(first.facts.values())))
    assert facts.cycle == 2
    assert list(facts.cycles()) == [1, 2]


def test_facts_of_a_kind_are_a_snapshot_in_the_order_of_ids() -> None:
    facts = RunFacts(RUN)

    def report(validator: str, sequence: int) -> Fact:
        key = FactKey("validate", 1, "report", validator)
        return Fact(RUN, key, cycle_pb2.ScoreReport(validator=validator), validator, "VALIDATE", sequence, 0)

    facts.add(report("vb", 1))
    before = facts.reports(1)
    for validator in before:
        facts.add(report("va", 2))
        assert validator == "vb"
    assert list(before) == ["vb"]
    assert list(facts.reports(1)) == ["va", "vb"]


def test_versions_are_by_cycle_and_the_latest_one_stands_last() -> None:
    facts = of_cycle(1, "train.opened")
    assert facts.latest_version is None
    facts.add(Fact(RUN, FactKey("merge", 1, "version"), cycle_pb2.VersionPublished(version=7), "A", "MERGE", 1, 0))
    assert {cycle: version.version for cycle, version in facts.versions.items()} == {1: 7}
    assert facts.latest_version == facts.version(1)


def test_a_cycle_starts_from_the_version_before_or_from_the_selection() -> None:
    facts = RunFacts(RUN)
    made = run_pb2.SelectionMade(initial_state=ArtifactRef(digest="s0"))
    facts.add(Fact(RUN, FactKey("run", 0, "selected"), made, "S", "RUNS", 1, 0))
    assert facts.window("train", 1).start == (0, ArtifactRef(digest="s0"))
    version = cycle_pb2.VersionPublished(version=1, state=ArtifactRef(digest="s1"))
    facts.add(Fact(RUN, FactKey("merge", 1, "version"), version, "A", "MERGE", 1, 0))
    assert facts.window("train", 2).start == (1, ArtifactRef(digest="s1"))


class Shelved:
    """A shelf that holds what was put there."""

    def __init__(self) -> None:
        self.facts: dict[FactKey, Fact] = {}

    def all(self, run: str, section: str, cycle: int, kind: str) -> dict[str, Fact]:
        place = (section, cycle, kind)
        found = {key.id: fact for key, fact in self.facts.items() if (key.section, key.cycle, key.kind) == place}
        return dict(sorted(found.items()))

    def put(self, fact: Fact) -> None:
        self.facts[fact.key] = fact


@pytest.mark.parametrize("shelved", [False, True])
def test_what_was_refused_to_one_party_is_found_without_the_others(shelved: bool) -> None:
    facts = RunFacts(RUN, shelf=Shelved())
    if shelved:
        facts.let_go(1)
    for sequence, id_ in enumerate(["ma-9", "mb-4", "ma-10", "ma-9", "maa-1", "ma"], 1):
        message = cycle_pb2.Refused(run=RUN, cycle=1, miner=id_.partition("-")[0])
        facts.add(Fact(RUN, FactKey("submit", 1, "refused", id_), message, "", "SUBMIT", sequence, 0))
    assert {fact.key.id for fact in facts.numbered("submit", 1, "refused", "ma")} == {"ma-9", "ma-10"}
    assert list(facts.window("submit", 1).refused) == ["ma", "ma-10", "ma-9", "maa-1", "mb-4"]
    assert len(facts.window("submit", 1).refusals("ma")) == 2
    assert facts.window("submit", 1).refusal("mb", 4) is not None
    assert facts.numbered("commit", 1, "refused", "ma") == []
