"""An untouched run is the same; every kind of tampering is found and named, whether signed again or not."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from connito.audit import chain, history
from connito.audit.audit import Audit, Options, against, audit, pure
from connito.audit.recompute import Recomputation, draws, merge
from connito.data.codecs.file import codec, read_coded
from connito.protocol.quota import LETTERS_PER_KEY
from connito.v1 import cycle_pb2 as c
from connito.v1 import run_pb2 as r

from tests.unit.connito.audit.world import MINERS, RUN, TENSOR, World, distance, tell

QUICK = Options(model=False, tolerance=0.0)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


@pytest.fixture
def world(told: World) -> World:
    return told.copy()


async def look(world: World, folder: Path) -> Audit:
    return audit(world.evidence(), await world.artifacts(folder), QUICK)


async def test_an_untouched_run_is_the_same(world: World, tmp_path: Path) -> None:
    found = await look(world, tmp_path)
    assert found.differences == []
    compared = {step.check: step.compared for step in found.steps if step.cycle in (0, 2)}
    assert compared["signatures"] == len(world.records)
    assert all(compared[name] > 0 for name in ("artifacts", "submissions", "reports", "draws", "merge", "expert"))
    assert found.to_json()["result"] == "same"


async def test_the_story_holds_what_it_is_meant_to_try(world: World) -> None:
    facts = world.evidence().facts
    first = facts.scored(1)
    assert first is not None
    by_miner = {verdict.miner: verdict for verdict in first.verdicts}
    assert by_miner[MINERS["C"]].status == c.VERDICT_STATUS_REJECTED
    assert by_miner[MINERS["A"]].rank == 1
    assert by_miner[MINERS["A"]].reward + by_miner[MINERS["B"]].reward == 1000
    settled = facts.window("submit", 2).settled
    assert settled is not None
    assert [entry.origin_cycle for entry in settled.submissions].count(1) == 1


def subjects() -> list[str]:
    """One subject of every kind of message, cycle 1 for those of a cycle."""
    windows = [f"{window}.1.{kind}" for window in ("train", "commit", "submit", "validate", "merge")
               for kind in ("opened", "closed")]  # fmt: skip
    return [
        "run.0.created", "run.0.miner.{A}", "run.0.validator.{v1}", "run.0.selected", "run.0.ended", *windows,
        "train.1.seed.{v1}", "commit.1.accepted.{A}", "commit.1.settled", "submit.1.accepted.{A}",
        "submit.1.refused.{L}-0", "submit.1.settled", "validate.1.seed.{v1}", "validate.1.drawn",
        "validate.1.report.{v1}", "merge.1.scored", "merge.1.version",
        "ingress.{A}.trained", "ingress.{A}.commitment", "ingress.{A}.reveal",
    ]  # fmt: skip


@pytest.mark.parametrize("subject", subjects())
async def test_a_flipped_byte_in_any_kind_of_message_is_found_and_named(
    world: World, tmp_path: Path, subject: str
) -> None:
    index = world.find(subject)
    record = world.records[index]
    world.flip(index, len(record.data) // 3)
    found = await look(world, tmp_path)
    assert found.first is not None
    assert found.first.check == "signatures"
    assert f"({record.stream} {record.sequence})" in found.first.where
    assert found.first.where.startswith(record.subject.split(".", 3)[-1])


@pytest.mark.parametrize("at", [0, 7, 45, 90, -3])
async def test_it_does_not_matter_which_byte(world: World, tmp_path: Path, at: int) -> None:
    world.flip(world.find("merge.2.version"), at)
    found = await look(world, tmp_path)
    assert any("merge.2.version" in difference.where for difference in found.differences)


async def test_every_artifact_is_hashed(told: World, tmp_path: Path) -> None:
    whole = await told.artifacts(tmp_path)
    assert set(whole.paths) == set(told.objects) - {told_late(told)} | {told_late(told)}
    for entry in whole.named:
        world = told.copy()
        data = bytearray(world.objects[entry.ref.digest])
        data[len(data) // 2] ^= 1
        world.objects[entry.ref.digest] = bytes(data)
        artifacts = await world.artifacts(tmp_path)
        differences = artifacts.step().differences
        assert differences, entry
        assert any(difference.where == str(entry) for difference in differences)


def told_late(world: World) -> str:
    settled = world.evidence().facts.window("submit", 2).settled
    assert settled is not None
    return next(entry.artifact.digest for entry in settled.submissions if entry.origin_cycle == 1)


async def test_a_missing_artifact_is_named_and_stops_nothing_else(world: World, tmp_path: Path) -> None:
    version = world.evidence().facts.version(1)
    assert version is not None
    del world.objects[version.state.digest]
    found = await look(world, tmp_path)
    assert found.first is not None
    assert (found.first.check, found.first.where.split(" (")[0]) == ("artifacts", "state of version 1")
    assert any(difference.check == "merge" and difference.cycle == 2 for difference in found.differences)


def _weights(message: c.VersionPublished) -> None:
    message.weights[0], message.weights[1] = message.weights[1] + 0.001, message.weights[0] - 0.001


def _reward(message: c.CycleScored) -> None:
    message.verdicts[0].reward += 1
    message.verdicts[1].reward -= 1


def _rise(loss: c.DomainLoss, change: float) -> None:
    """All of it in one sequence, so that no test of significance tells."""
    loss.after_sums[:] = [loss.before_sums[0] + change * loss.tokens, *loss.before_sums[1:]]
    loss.after = math.fsum(loss.after_sums) / loss.tokens


def _loss(message: c.ScoreReport) -> None:
    message.scores[0].losses[0].after -= 1e-9


RESIGNED = [
    ("commit.1.accepted.{A}", c.CommitmentAccepted, lambda m: setattr(m, "digest", b"x" * 32), "commitments"),
    ("commit.1.accepted.{A}", c.CommitmentAccepted, lambda m: setattr(m, "ingress_sequence", 1), "commitments"),
    ("commit.1.settled", c.WindowSettled, lambda m: m.committed.pop(), "commitments"),
    ("commit.1.closed", c.WindowClosed, lambda m: setattr(m, "last_sequence", 6), "windows"),
    ("submit.1.closed", c.WindowClosed, lambda m: setattr(m, "last_sequence", 1), "windows"),
    ("submit.1.closed", c.WindowClosed, lambda m: setattr(m, "stream", "TRAIN"), "windows"),
    ("submit.1.accepted.{B}", c.RevealAccepted, lambda m: setattr(m.submission, "commit_sequence", 1), "submissions"),
    ("submit.1.accepted.{B}", c.RevealAccepted, lambda m: setattr(m.submission.artifact, "digest", "0" * 64),
     "submissions"),
    ("submit.1.settled", c.WindowSettled, lambda m: m.submissions.pop(), "submissions"),
    ("submit.2.settled", c.WindowSettled, lambda m: setattr(m.submissions[0], "origin_cycle", 2), "submissions"),
    ("submit.1.refused.{L}-0", c.Refused, lambda m: setattr(m, "window", c.WINDOW_COMMIT), "submissions"),
    ("ingress.{A}.commitment", c.Commitment, lambda m: setattr(m, "digest", b"y" * 32), "commitments"),
    ("ingress.{A}.reveal", c.Reveal, lambda m: setattr(m, "salt", b"z" * 16), "submissions"),
    ("ingress.{B}.reveal", c.Reveal, lambda m: setattr(m.artifact, "size", 3), "submissions"),
    ("train.1.seed.{v1}", c.SeedCommitted, lambda m: setattr(m, "digest", b"x" * 32), "rules"),
    ("validate.1.seed.{v1}", c.SeedRevealed, lambda m: setattr(m, "secret", b"x" * 32), "rules"),
    ("validate.1.drawn", c.SeedDrawn, lambda m: setattr(m, "seed", b"x" * 32), "rules"),
    ("validate.1.drawn", c.SeedDrawn, lambda m: m.omitted.append(m.validators.pop()), "rules"),
    ("validate.1.report.{v1}", c.ScoreReport, _loss, "reports"),
    ("validate.1.report.{v1}", c.ScoreReport, lambda m: setattr(m.scores[0], "utility", 0.5), "reports"),
    ("validate.1.report.{v1}", c.ScoreReport, lambda m: m.scores.pop(), "reports"),
    ("validate.1.report.{v1}", c.ScoreReport, lambda m: setattr(m, "seed", b"x" * 32), "reports"),
    ("merge.1.scored", c.CycleScored, _reward, "verdicts"),
    ("merge.1.scored", c.CycleScored, lambda m: setattr(m.verdicts[0], "utility", 9.0), "verdicts"),
    ("merge.1.scored", c.CycleScored, lambda m: setattr(m, "unallocated", 5), "verdicts"),
    ("merge.1.scored", c.CycleScored, lambda m: setattr(m.validators[0], "deviation", 0.5), "verdicts"),
    ("merge.1.version", c.VersionPublished, _weights, "verdicts"),
    ("merge.1.version", c.VersionPublished, lambda m: setattr(m, "gate", c.GATE_DECISION_TOP_1), "merge"),
    ("merge.1.version", c.VersionPublished, lambda m: setattr(m, "parent", 7), "versions"),
    ("merge.1.version", c.VersionPublished, lambda m: setattr(m.gate_losses[0], "after", 99.0), "gate"),
    ("merge.1.version", c.VersionPublished, lambda m: m.gate_losses[0].after_sums.__setitem__(0, 99.0), "gate"),
    ("merge.2.version", c.VersionPublished, lambda m: setattr(m.losses[0], "before", 99.0), "versions"),
    ("merge.2.version", c.VersionPublished, lambda m: setattr(m.gate_losses[0], "before", 99.0), "versions"),
    ("merge.2.version", c.VersionPublished, lambda m: _rise(m.gate_losses[0], 0.06), "gate"),
    ("train.2.opened", c.WindowOpened, lambda m: setattr(m, "version", 0), "windows"),
    ("train.1.opened", c.WindowOpened, lambda m: m.expected.append("UNOBODY"), "windows"),
    ("run.0.ended", r.RunEnded, lambda m: setattr(m, "final_version", 1), "expert"),
]  # fmt: skip


@pytest.mark.parametrize(("subject", "kind", "change", "check"), RESIGNED)
async def test_a_message_that_was_changed_and_signed_again_is_found_by_what_follows_from_it(
    world: World, tmp_path: Path, subject: str, kind: type, change: Callable[..., Any], check: str
) -> None:
    world.resign(subject, change, kind)
    found = await look(world, tmp_path)
    assert found.first is not None
    assert check in {difference.check for difference in found.differences}
    assert "signatures" not in {difference.check for difference in found.differences}


async def test_a_broker_whose_clock_was_set_back_wrote_nothing_too_early(world: World) -> None:
    """Streams tell: what lies behind in one was written later. Where none of them knows of another clock, times count."""
    untouched, back = list(world.records), world.find("submit.2.closed")
    for number, record in enumerate(untouched[back:], back):
        world.records[number] = dataclasses.replace(record, time_unix_ms=record.time_unix_ms - 1_800_000)
    assert not history.windows(world.evidence(), 2).differences
    world.records, late = untouched, world.find("train.2.closed")
    record = world.records[late]
    world.records[late] = dataclasses.replace(record, time_unix_ms=record.time_unix_ms + 1_800_000)
    found = [difference.what for difference in history.windows(world.evidence(), 2).differences]
    assert "was written before what it follows" in found


async def test_another_state_is_found_by_merging_again(world: World, tmp_path: Path) -> None:
    """The aggregator publishes a state of its own, stores it, and names it everywhere it has a say."""
    evidence = world.evidence()
    version = evidence.facts.version(2)
    assert version is not None
    data = bytearray(world.objects[version.state.digest])
    data[-1] ^= 1
    other = world.upload(bytes(data))
    world.resign("merge.2.version", lambda m: m.state.CopyFrom(other), c.VersionPublished)
    found = await look(world, tmp_path)
    assert found.first is not None
    assert (found.first.check, found.first.where, found.first.cycle) == ("merge", "merge.2.version", 2)
    assert found.first.what.startswith(f"state.digest: '{version.state.digest}' recomputed")


@pytest.mark.parametrize("cheat", ["elsewhere", "no code", "none"])
async def test_a_coded_step_has_to_lead_to_the_state(world: World, tmp_path: Path, cheat: str) -> None:
    """The aggregator publishes the right state, and a step by which whoever held the one before comes to another, or nowhere."""
    facts = world.evidence().facts
    first, second = facts.version(1), facts.version(2)
    assert first is not None
    assert second is not None
    other = {"elsewhere": first.step, "no code": world.upload(b"connito\x01" + bytes(60)), "none": None}[cheat]
    world.resign(
        "merge.2.version", lambda m: m.step.CopyFrom(other) if other else m.ClearField("step"), c.VersionPublished
    )
    found = await look(world, tmp_path)
    assert found.first is not None
    assert (found.first.check, found.first.where, found.first.cycle) == ("merge", "merge.2.version", 2)
    why = {"elsewhere": "step: leads to", "no code": "step: cannot be decoded", "none": "step: one recomputed, none"}
    assert found.first.what.startswith(why[cheat])


async def test_a_step_that_another_library_compressed_is_the_same(world: World, tmp_path: Path) -> None:
    version = world.evidence().facts.version(2)
    assert version is not None
    how, layout = codec("int8"), {TENSOR: ("F32", (2, 3))}
    ((_, delta),) = read_coded(how, layout, world.objects[version.step.digest])
    file, planes = world.objects[version.step.digest][:13], how.encode(delta)
    for plane in planes:
        stored = zlib.compressobj(0, zlib.DEFLATED, -15)
        coded = stored.compress(plane.tobytes()) + stored.flush()
        file += len(coded).to_bytes(4, "little") + coded
    other = world.upload(file)
    assert other.digest != version.step.digest
    world.resign("merge.2.version", lambda m: m.step.CopyFrom(other), c.VersionPublished)
    assert not [each for each in (await look(world, tmp_path)).differences if each.check in ("merge", "artifacts")]


async def test_the_gate_is_recomputed_where_states_can_be_measured(world: World, tmp_path: Path) -> None:
    artifacts = await world.artifacts(tmp_path)
    bench = Recomputation(world.evidence(), artifacts, 0.0, measure=distance)
    assert [merge(bench, cycle).differences for cycle in (1, 2)] == [(), ()]
    world.resign("merge.1.version", lambda m: setattr(m.losses[0], "after", 0.25), c.VersionPublished)
    step = merge(dataclasses.replace(bench, evidence=world.evidence()), 1)
    assert [difference.what.split(":")[0] for difference in step.differences] == ["losses of recipes, after"]


async def test_sequences_that_the_seed_does_not_draw_are_found(world: World, tmp_path: Path) -> None:
    def elsewhere(message: c.ScoreReport) -> None:
        message.scores[1].losses[0].sequence += 1

    world.resign("validate.1.report.{v2}", elsewhere, c.ScoreReport)
    bench = Recomputation(world.evidence(), await world.artifacts(tmp_path), 0.0)
    assert len(draws(bench, 1).differences) == 1
    assert draws(bench, 2).differences == ()


def test_a_message_that_was_removed_is_missed(told: World) -> None:
    silent = {"train.1.seed.{v1}", "commit.1.settled", "submit.1.accepted.{A}", "submit.1.closed", "validate.1.drawn",
              "merge.1.scored", "ingress.{A}.commitment", "ingress.{A}.reveal", "train.1.opened"}  # fmt: skip
    for subject in sorted(silent):
        world = told.copy()
        del world.records[world.find(subject)]
        evidence = world.evidence()
        assert [d for step in pure(evidence, 1) for d in step.differences], subject


def test_a_version_that_was_removed_is_missed(told: World) -> None:
    for cycle in (1, 2):
        world = told.copy()
        del world.records[world.find(f"merge.{cycle}.version")]
        evidence = world.evidence()
        found = [d for number in (1, 2) for step in pure(evidence, number) for d in step.differences]
        assert found[0].where == f"merge.{cycle}.version"


@pytest.mark.parametrize("subject", ["run.0.miner.{A}", "validate.1.report.{v1}", "submit.1.refused.{L}-0"])
async def test_people_reports_and_refusals_that_were_removed_are_missed(
    world: World, tmp_path: Path, subject: str
) -> None:
    if subject.startswith("submit"):
        late = [i for i, record in enumerate(world.records) if ".submit.1.refused." in record.subject]
        for index in reversed(late):
            del world.records[index]
    else:
        del world.records[world.find(subject)]
    assert (await look(world, tmp_path)).differences


async def test_a_run_that_goes_on_is_the_same_at_every_moment(told: World, tmp_path: Path) -> None:
    """Nothing that has not happened yet is missed."""
    artifacts = await told.artifacts(tmp_path)
    for count in range(1, len(told.records) + 1):
        world = told.copy()
        del world.records[count:]
        found = audit(world.evidence(), artifacts, QUICK)
        assert found.differences == [], (count, world.records[-1].subject, found.first)


def test_a_message_of_another_run_or_stream_does_not_count(world: World) -> None:
    index = world.find("merge.1.version")
    world.records[index] = dataclasses.replace(world.records[index], stream="TRAIN", sequence=999)
    evidence = world.evidence()
    assert len(evidence.unreadable) == 1
    assert evidence.facts.version(1) is None


def test_of_what_a_key_sends_without_end_so_many_dead_letters_are_kept(world: World) -> None:
    from connito.audit.evidence import read, signatures
    from connito.wire.fact import Record

    from tests.unit.connito.audit.world import ROSTER

    def junk(number: int, key: str = "flooder") -> Record:
        return Record("INGRESS", 700 + number, f"connito.v1.{RUN}.ingress.{key}.reveal", b"junk", 0)

    records = [*world.records, *(junk(number) for number in range(100))]
    letters = [
        c.DeadLetter(stream="INGRESS", sequence=record.sequence, subject=record.subject, body=b"junk")
        for record in records[-100:]
    ]
    assert signatures(read(RUN, records, ROSTER, letters[:LETTERS_PER_KEY])).differences == ()
    missing = signatures(read(RUN, records, ROSTER, letters[: LETTERS_PER_KEY - 1])).differences
    assert len(missing) == 100 - LETTERS_PER_KEY + 1, "a committer keeps as many as the rules say"
    others = [*records, junk(200, "other")]
    assert len(signatures(read(RUN, others, ROSTER, letters[:LETTERS_PER_KEY])).differences) == 1, "of each key"


def test_what_a_miner_sent_may_be_anything_if_it_is_among_the_dead_letters(world: World) -> None:
    from connito.audit.evidence import read, signatures

    from tests.unit.connito.audit.world import ROSTER

    junk = dataclasses.replace(world.records[world.find("ingress.{A}.trained")], sequence=777, data=b"junk")
    records = [*world.records, junk]
    assert len(signatures(read(RUN, records, ROSTER)).differences) == 1
    letter = c.DeadLetter(stream="INGRESS", sequence=777, subject=junk.subject, body=b"junk")
    assert signatures(read(RUN, records, ROSTER, [letter])).differences == ()
    letter.body = b"something else"
    assert len(signatures(read(RUN, records, ROSTER, [letter])).differences) == 1


async def test_what_cannot_be_recomputed_breaks_the_chain(world: World, tmp_path: Path) -> None:
    before = chain.windows_of(world.records)
    assert list(before)[:3] == ["run", "train.1", "commit.1"]
    assert list(before)[-2:] == ["library", "ingress"]
    assert chain.first_break(before, chain.windows_of(reversed(world.records))) == ""
    world.resign("validate.1.report.{v1}", lambda m: setattr(m, "seconds", 99.0), c.ScoreReport)
    found = await look(world, tmp_path)
    assert [(difference.check, difference.where) for difference in found.differences] == [("heads", "run.2.head")]
    compared = against(found, before)
    assert (compared.differences[-1].check, compared.differences[-1].where) == ("chain", "validate.1")
    assert chain.head(found.windows) != chain.head(before)


async def test_a_deposit_says_what_the_log_says_and_is_attested(world: World, tmp_path: Path) -> None:
    subject = next(s for record in world.records if ".deposited." in (s := record.subject)).removeprefix("connito.v1.")
    place = subject.partition(".")[2]
    for name in ("bare", "forged"):
        (tmp_path / name).mkdir()
    world.resign(place, lambda m: m.ClearField("attestation"), r.ExpertDeposited)
    assert "expert" in {difference.check for difference in (await look(world, tmp_path / "bare")).differences}
    world.resign(place, lambda m: _repeat(world, m, license="mine"), r.ExpertDeposited)
    found = await look(world, tmp_path / "forged")
    assert found.first is not None
    assert found.first.what == "the record says another license than the log"


def _repeat(world: World, message: r.ExpertDeposited, **changes: object) -> None:
    record = {**json.loads(world.objects[message.record.digest]), **changes}
    message.record.CopyFrom(world.upload(json.dumps(record).encode()))


@pytest.mark.parametrize("when", ["before", "after"])
async def test_scores_are_on_the_record_where_they_were_written_before_it(tmp_path: Path, when: str) -> None:
    """What came late, of a service that began before another gave it up, makes no other record of it."""
    for name in ("told", "looked"):
        (tmp_path / name).mkdir()
    world = tell(tmp_path / "told", scored=when)
    found = await look(world, tmp_path / "looked")
    assert found.differences == []
    (deposited,) = [fact.message for fact in world.facts.deposits.values()]
    record = json.loads(world.objects[deposited.record.digest])
    assert [row["name"] for row in record.get("scores", [])] == (["exam"] if when == "before" else [])


async def test_what_is_said_of_an_expert_later_makes_no_other_run_of_it(world: World) -> None:
    before = chain.windows_of(world.records)
    world.say("library", 0, "used", id="a", expert_id="x", verb="export", units=1)
    assert chain.windows_of(world.records) == before
