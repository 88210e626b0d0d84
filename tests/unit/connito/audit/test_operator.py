"""What a dishonest operator can do with the keys of all services and one friendly validator, and how it is found."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from connito.audit import heads, recompute
from connito.audit.artifacts import Artifacts
from connito.audit.audit import Audit, Options, audit
from connito.data.tensors import read_tensors
from connito.protocol import rules
from connito.protocol.beacon import draw_seed
from connito.protocol.commitment import commitment_digest
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION
from connito.wire.checkpoint import Checkpoint

from tests.support.run import Run
from tests.unit.connito.audit.world import MINERS, RUN, TENSOR, VALIDATORS, WORK, Cycle, World, state, tell

QUICK = Options(model=False, tolerance=0.0)


async def look(world: World, folder: Path) -> Audit:
    return audit(world.evidence(), await world.artifacts(folder), QUICK)


class _Draw(Cycle):
    """All three reveal in time; the draw is made with `kept` alone."""

    kept = "12"

    def validate(self, artifacts: Artifacts) -> None:
        self.open("validate", VALIDATORS.values())
        for name, key in VALIDATORS.items():
            self.world.seed_revealed(key, self.number, self.secret(name))
        seed = draw_seed(RUN, self.number, {VALIDATORS[name]: self.secret(name) for name in self.kept})
        omitted = sorted(key for name, key in VALIDATORS.items() if name not in self.kept)
        keys = [VALIDATORS[name] for name in self.kept]
        self.world.drawn(*keys, cycle=self.number, seed=seed, omitted=omitted, **self.fields())
        numbers = recompute.draw_of(self.spec, artifacts, seed)
        for key in keys:
            scores = [self.score(entry, numbers) for entry in self.submissions]
            self.world.reported(key, self.number, seed=seed, state_digest=self.theta.digest, scores=scores, seconds=1.5)
        self.close("validate")

    def fields(self) -> dict[str, Any]:
        return {}


class OneLeftOut(_Draw):
    kept = "12"


class OneFriend(_Draw):
    kept = "1"


class FriendlyCut(_Draw):
    """The cut is said to lie behind the friend's reveal, and the others' to be late."""

    kept = "1"

    def fields(self) -> dict[str, Any]:
        return {"last_sequence": self.world.facts.seed_reveals(self.number)[VALIDATORS["1"]].sequence}


class CutOfTwo(FriendlyCut):
    """Two of three draw before half of the time is over, and the third's reveal is said to lie behind the cut."""

    kept = "12"

    def open(self, window: str, expected: Iterable[str] = ()) -> None:
        deadline = self.world.now + 100_000
        given = {"state": self.theta, "version": self.version, "deadline_unix_ms": deadline}
        self.world.opened(window, self.number, expected, **given)

    def close(self, window: str, cause: Any = cycle_pb2.CLOSE_CAUSE_ALL_ACTED) -> int:
        self.world.now += 100_000
        return super().close(window, cause)

    def fields(self) -> dict[str, Any]:
        return {"last_sequence": self.world.facts.seed_reveals(self.number)[VALIDATORS["2"]].sequence}


class FewNamed(Cycle):
    """The third validator committed in time, and validate is opened without it."""

    def open(self, window: str, expected: Iterable[str] = ()) -> None:
        super().open(window, [VALIDATORS["1"], VALIDATORS["2"]] if window == "validate" else expected)


class EarlyClose(Cycle):
    """The commit window of cycle 2 closes by deadline, which is an hour away, before B's commitment."""

    cause: Any = cycle_pb2.CLOSE_CAUSE_DEADLINE

    def commit(self) -> None:
        if self.number != 2:
            super().commit()
            return
        self.world.opened("commit", 2, [MINERS[name] for name in self.miners], state=self.theta, version=self.version,
                          deadline_unix_ms=self.world.now + 3_600_000)  # fmt: skip
        for name in ("A", "C"):
            self.world.committed(MINERS[name], 2, self.prepare(name))
        self.close("commit", self.cause)
        late = self.world.hear(MINERS["B"], "commitment", 2, digest=self.prepare("B"))
        self.refuse("commit", "B", late.sequence, reasons_pb2.REASON_LATE_COMMITMENT)
        self.world.settled("commit", 2)

    def prepare(self, name: str) -> bytes:
        start = read_tensors(self.world.objects[self.theta.digest], [TENSOR])[0][TENSOR]
        artifact = self.world.upload(state(start + np.array(WORK[name], np.float32), name), REALM_SUBMISSION)
        salt, base = name.encode().ljust(16, b"-"), self.theta.digest
        self.reveals[name] = cycle_pb2.Reveal(run=RUN, cycle=2, artifact=artifact, base_state_digest=base, salt=salt)
        return commitment_digest(RUN, 2, MINERS[name], base, artifact.digest, salt)

    def submit(self, rolled: Iterable[cycle_pb2.Submission]) -> None:
        if self.number == 2:
            self.miners = ["A", "C"]
        super().submit(rolled)


class CloseOnB(EarlyClose):
    """The same, said to be because everybody had acted."""

    cause = cycle_pb2.CLOSE_CAUSE_ALL_ACTED


class LeftUnnamed(CloseOnB):
    """B trained and was awaited in it, the commit window names A and C alone, and closes behind the two."""

    def commit(self) -> None:
        names, self.miners = self.miners, [name for name in self.miners if name != "B" or self.number != 2]
        super().commit()
        self.miners = names

    def close(self, window: str, cause: Any = cycle_pb2.CLOSE_CAUSE_ALL_ACTED) -> int:
        self.world.now += 5_000 if window == "train" else 0
        return super().close(window, cause)


CHEATS = [OneLeftOut, OneFriend, FriendlyCut, CutOfTwo, FewNamed, EarlyClose, CloseOnB]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


@pytest.mark.parametrize("story", [*CHEATS, LeftUnnamed])
async def test_a_choice_that_the_rules_leave_to_nobody_is_found_and_lies_with_the_operator(
    story: type[Cycle], tmp_path: Path
) -> None:
    found = await look(tell(tmp_path, story=story), tmp_path)
    assert {difference.check for difference in found.differences} == {"rules"}
    assert found.blame == ["operator"]


@pytest.mark.parametrize("story", CHEATS)
async def test_validators_and_aggregator_see_it_too_and_judge_nobody(story: type[Cycle], tmp_path: Path) -> None:
    facts = tell(tmp_path, story=story).evidence().facts
    cycle = 2
    assert rules.fault(facts, cycle, lambda validator: 1.0) is not None
    scored = facts.scored(cycle)
    assert scored is not None
    assert {verdict.reason for verdict in scored.verdicts} <= {reasons_pb2.REASON_NO_QUORUM, reasons_pb2.REASON_COPY}
    assert {verdict.reward for verdict in scored.verdicts} == {0}


async def test_an_honest_run_breaks_no_rule(told: World, tmp_path: Path) -> None:
    found = await look(told, tmp_path)
    assert found.differences == []
    assert found.blame == []


def deciding(world: World) -> list[int]:
    """Every message but the last cosignatures, which decide nothing."""
    last = world.evidence().facts.next_head - 1
    return [i for i, record in enumerate(world.records) if f".run.{last}.cosigned." not in record.subject]


async def test_every_message_that_is_taken_out_is_missed(told: World, tmp_path: Path) -> None:
    artifacts = await told.artifacts(tmp_path)
    for index in deciding(told):
        world = told.copy()
        del world.records[index]
        found = audit(world.evidence(), artifacts, QUICK)
        assert "operator" in found.blame, told.records[index].subject


async def test_every_two_neighbours_of_a_stream_that_are_exchanged_are_found(told: World, tmp_path: Path) -> None:
    artifacts, streams = await told.artifacts(tmp_path), defaultdict(list)
    for index in deciding(told):
        streams[told.records[index].stream].append(index)
    for places in streams.values():
        for one, other in itertools.pairwise(places):
            world = told.copy()
            left, right = world.records[one], world.records[other]
            world.records[one] = dataclasses.replace(right, sequence=left.sequence, time_unix_ms=left.time_unix_ms)
            world.records[other] = dataclasses.replace(left, sequence=right.sequence, time_unix_ms=right.time_unix_ms)
            assert audit(world.evidence(), artifacts, QUICK).differences, (left.subject, right.subject)


@pytest.mark.parametrize("change", [{"time_unix_ms": 5}, {"sequence": 10_000}])
async def test_when_and_where_a_message_was_stored_cannot_be_changed(
    told: World, tmp_path: Path, change: dict[str, int]
) -> None:
    world = told.copy()
    index = world.find("ingress.{B}.trained")
    world.records[index] = dataclasses.replace(world.records[index], **change)  # type: ignore[arg-type]
    assert "receipts" in {difference.check for difference in (await look(world, tmp_path)).differences}


OF_A_VALIDATOR: list[Callable[[cycle_pb2.ScoreReport], object]] = [
    lambda report: setattr(report.scores[0], "utility", 0.5),
    lambda report: report.scores.pop(),
    lambda report: setattr(report.scores[0].losses[0], "after", 0.5),
    lambda report: report.scores[0].ClearField("losses"),
]


class _Lies(Cycle):
    """The third validator reports what does not follow from its losses; the operator's services do as they should."""

    lie: Callable[[cycle_pb2.ScoreReport], object]

    def validate(self, artifacts: Artifacts) -> None:
        report = self.world.reported

        def lying(validator: str, cycle: int, **fields: Any) -> World:
            if validator == VALIDATORS["3"]:
                message = cycle_pb2.ScoreReport(**fields)
                type(self).lie(message)
                fields["scores"] = list(message.scores)
            return report(validator, cycle, **fields)

        self.world.reported = lying  # type: ignore[method-assign,assignment]
        super().validate(artifacts)
        self.world.reported = report  # type: ignore[method-assign]


@pytest.mark.parametrize("lie", OF_A_VALIDATOR)
async def test_what_a_validator_lies_about_is_its_own_doing(
    lie: Callable[[cycle_pb2.ScoreReport], object], tmp_path: Path
) -> None:
    story = type("Lies", (_Lies,), {"lie": staticmethod(lie)})
    found = await look(tell(tmp_path, story=story), tmp_path)
    assert found.differences
    assert found.blame == [f"validator {VALIDATORS['3']}"]


class Ghost(Cycle):
    """The third validator cosigns a head that never was."""

    def train(self) -> None:
        super().train()
        if self.number == 1:
            key = VALIDATORS["3"]
            message = run_pb2.HeadCosigned(run=RUN, cycle=9, validator=key, signature="nonsense")
            self.world.publish("run", 9, "cosigned", message, key, key)


async def test_who_cosigns_a_head_that_never_was_does_not_frame_the_operator(tmp_path: Path) -> None:
    found = await look(tell(tmp_path, story=Ghost), tmp_path)
    assert found.blame == [f"validator {VALIDATORS['3']}"]


AHEAD = {
    ("train", "seed"): cycle_pb2.SeedCommitted,
    ("validate", "seed"): cycle_pb2.SeedRevealed,
    ("validate", "report"): cycle_pb2.ScoreReport,
    ("validate", "objection"): cycle_pb2.Objection,
}


@pytest.mark.parametrize("cycle", [4, 900])
@pytest.mark.parametrize("place", AHEAD, ids="-".join)
async def test_who_speaks_of_a_cycle_that_never_was_does_not_frame_the_operator(
    place: tuple[str, str], cycle: int, tmp_path: Path
) -> None:
    class Ahead(Cycle):
        def train(self) -> None:
            super().train()
            if self.number == 1:
                key, (section, kind) = VALIDATORS["3"], place
                message = AHEAD[place](run=RUN, cycle=cycle, validator=key)
                self.world.publish(section, cycle, kind, message, key, key)

    found = await look(tell(tmp_path, story=Ahead), tmp_path)
    assert found.blame == []


def test_a_head_of_any_number_is_missed_at_once() -> None:
    """All validators of a run, which may be one, can say that they cosigned it."""
    (key, *_) = VALIDATORS.values()
    story = Run(name=RUN).created().validators(key)
    story.say("run", 4_000_000_000, "cosigned", validator=key, signature="nonsense")
    evidence: Any = SimpleNamespace(facts=story.facts)
    missing = heads._missing(evidence)
    assert [difference.where for difference in itertools.islice(missing, 9)] == [
        "run.1.head", "run.2.head", "run.4000000000.head"
    ]  # fmt: skip


@pytest.mark.parametrize(("liars", "blamed"), [(1, "validator"), (2, "validator"), (3, "operator")])
def test_two_histories_are_what_most_validators_say(liars: int, blamed: str) -> None:
    """Not most of those who cosigned this head: others may have skipped it for the next."""
    keys = [*VALIDATORS.values(), MINERS["A"], MINERS["B"]]
    story = Run(name=RUN).created().validators(*keys)
    for key in keys[:liars]:
        story.say("run", 1, "cosigned", validator=key, signature="nonsense")
    evidence: Any = SimpleNamespace(facts=story.facts)
    found = list(heads._cosignatures(evidence, 1, Checkpoint("log", 1, bytes(32))))
    assert {difference.by.split()[0] for difference in found} == {blamed}


class Garbage(Cycle):
    """Somebody without a key put bytes on the subject of a fact while the run went on."""

    def merge(self, folder: Path) -> cycle_pb2.VersionPublished:
        published = super().merge(folder)
        last = self.world.records[-1]
        sequence = self.world.sequences["MERGE"] = last.sequence + 1
        subject = f"connito.v1.{RUN}.merge.{self.number}.version"
        self.world.records.append(dataclasses.replace(last, subject=subject, sequence=sequence, data=b"junk"))
        return published


async def test_bytes_that_nobody_signed_and_a_head_covers_are_nobodys_fault(tmp_path: Path) -> None:
    found = await look(tell(tmp_path, story=Garbage), tmp_path)
    assert {difference.check for difference in found.differences} == {"signatures"}
    assert found.blame == ["nobody"]


async def test_without_the_store_everything_that_the_log_shows_is_checked(told: World, tmp_path: Path) -> None:
    log_only = Options(model=False, files=False)
    found = audit(told.evidence(), Artifacts(), log_only)
    assert found.differences == []
    assert {"rules", "verdicts", "heads", "receipts"} <= {step.check for step in found.steps}
    assert not {"artifacts", "merge", "draws", "expert"} & {step.check for step in found.steps}
    cheated = tell(tmp_path, story=EarlyClose)
    assert audit(cheated.evidence(), Artifacts(), log_only).blame == ["operator"]
