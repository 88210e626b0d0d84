"""What is said of runs that do not exist: not kept in memory, and not lost either."""

from __future__ import annotations

from connito.protocol.findings import PROTOCOL_VERSION
from connito.service.unbegun import Unbegun
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.heads import LogTrees
from connito.wire.identity import Identity
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import INSTALLATION, LIBRARY, fact, ingress
from google.protobuf.message import Message

COORDINATOR, VALIDATOR, MINER = (Identity.generate() for _ in range(3))
ROSTER = Roster({"coordinator": frozenset({COORDINATOR.public}), "validator": frozenset({VALIDATOR.public})})


def said(who: Identity, stream: str, sequence: int, subject: str, message: Message) -> Record:
    return Record(stream, sequence, subject, seal(who, subject, message).SerializeToString(), sequence, {"a": "b"})


def trained(run: str, sequence: int, cycle: int = 1) -> Record:
    message = cycle_pb2.TrainingFinished(run=run, cycle=cycle)
    return said(MINER, "INGRESS", sequence, ingress(run, MINER.public, "trained"), message)


def joined(run: str, sequence: int) -> Record:
    message = run_pb2.ValidatorJoined(run=run, validator=VALIDATOR.public)
    return said(VALIDATOR, "RUNS", sequence, fact(run, "run", 0, "validator", VALIDATOR.public), message)


def created(run: str, sequence: int) -> Record:
    message = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run, cycles=3, protocol_version=PROTOCOL_VERSION))
    return said(COORDINATOR, "RUNS", sequence, fact(run, "run", 0, "created"), message)


def test_runs_that_do_not_exist_leave_nothing_in_memory() -> None:
    """One key had the services of all runs hold 3 kB for each of its messages, for good."""
    aside, log = Unbegun(Kept()), Log(ROSTER)
    for number in range(1, 201):
        for record in (trained(f"ghost-{number}", number), joined(f"ghost-{number}", number)):
            for ready in aside.ready(record):
                log.apply(ready)
    assert not log.runs
    assert not log.parts.waiting


def test_what_was_read_before_its_run_began_comes_back_in_its_order() -> None:
    """Streams are read side by side: INGRESS may be ahead of RUNS. A tree over the log is the same either way."""
    records = [trained("r", 7), joined("r", 1), trained("other", 8), created("r", 2), trained("r", 9)]
    aside, late, plain = Unbegun(Kept()), Log(ROSTER, LogTrees()), Log(ROSTER, LogTrees())
    steps = [list(aside.ready(record)) for record in records]
    assert steps == [[], [], [], [records[1], records[3], records[0]], [records[4]]]
    assert steps[3][2].headers == {"a": "b"}
    for ready in (one for step in steps for one in step):
        late.apply(ready)
    for record in (record for record in records if ".other." not in record.subject):
        plain.apply(record)
    assert late.runs == plain.runs
    assert late.trees == plain.trees


def test_what_is_about_every_run_is_read_at_once_from_services_alone() -> None:
    aside = Unbegun(Kept())
    ban = said(COORDINATOR, "RUNS", 1, fact(INSTALLATION, "run", 0, "ban", "U-1"), run_pb2.MinerBan(run=INSTALLATION))
    notice = said(COORDINATOR, "LIBRARY", 2, fact(LIBRARY, "library", 0, "notice", "x"), run_pb2.ExpertNotice())
    assert list(aside.ready(ban)) == [ban]
    assert list(aside.ready(notice)) == [notice]
    for run in (INSTALLATION, LIBRARY):
        assert not [*aside.ready(joined(run, 3)), *aside.ready(trained(run, 4))]


def test_cycles_that_a_run_will_never_have_are_not_kept() -> None:
    log = Log(ROSTER)
    log.apply(created("r", 1))
    kept = len(log.runs["r"].facts)
    for cycle in (20, 1000, 2**32 - 1):
        assert log.apply(trained("r", cycle, cycle)) is None
    assert len(log.runs["r"].facts) == kept
    assert log.apply(trained("r", 2, 3)) is not None
