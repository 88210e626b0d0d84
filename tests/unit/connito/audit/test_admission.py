"""Bans and invites in a run's record: what follows from them is recomputed, and what nobody ordered is found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from connito.audit.admission import admission
from connito.audit.audit import Audit, Options, audit
from connito.audit.evidence import signatures
from connito.errors import Invalid
from connito.protocol.asked import ORDER_SUBJECT, check_asked
from connito.protocol.policy.law import fill
from connito.v1 import cycle_pb2 as c
from connito.v1 import reasons_pb2
from connito.v1 import run_pb2 as r
from connito.wire import invites
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.support.run import enrolment, ordered
from tests.unit.connito.audit.world import MINERS, RUN, Cycle, World, identity, tell

QUICK = Options(model=False, tolerance=0.0)


class BannedWhileSubmitting(Cycle):
    """C is put out in cycle 2, after its reveal was accepted and before the window closes."""

    def accept(self, entry: c.Submission) -> None:
        super().accept(entry)
        if (entry.miner, entry.origin_cycle) == (MINERS["C"], 2):
            self.ban("C")


class BannedWhileScored(Cycle):
    """A, the best, is put out in cycle 2 while validators score."""

    def validate(self, artifacts: object) -> None:
        if self.number == 2:
            self.ban("A")
        super().validate(artifacts)  # type: ignore[arg-type]


class BannedByNobody(Cycle):
    """The coordinator bans on the order of a miner."""

    def commit(self) -> None:
        if self.number == 2:
            self.ban("B", by="miner A")
            self.ban("B", by="miner A", lifted=True)
        super().commit()


def look(world: World, folder: Path) -> Audit:
    return audit(world.evidence(), asyncio.run(world.artifacts(folder)), QUICK)


def test_a_ban_in_mid_cycle_is_recomputed(tmp_path: Path) -> None:
    world = tell(tmp_path, story=BannedWhileSubmitting)
    facts = world.evidence().facts
    settled = facts.window("submit", 2).settled
    assert settled is not None
    assert MINERS["C"] not in {entry.miner for entry in settled.submissions}
    assert look(world, tmp_path).differences == []


def test_a_ban_while_validators_score_leaves_the_work_unmerged_and_unpaid(tmp_path: Path) -> None:
    world = tell(tmp_path, story=BannedWhileScored)
    facts = world.evidence().facts
    scored, version = facts.scored(2), facts.version(2)
    assert scored is not None
    assert version is not None
    (verdict,) = [verdict for verdict in scored.verdicts if verdict.miner == MINERS["A"]]
    assert (verdict.reason, verdict.reward, verdict.status) == (
        reasons_pb2.REASON_BANNED, 0, c.VERDICT_STATUS_REJECTED
    )  # fmt: skip
    assert verdict.finding.text == "floods"
    assert MINERS["A"] not in version.merged
    assert sum(v.reward for v in scored.verdicts) + scored.unallocated == 1000
    assert look(world, tmp_path).differences == []


def test_letting_a_banned_miner_in_is_found(tmp_path: Path) -> None:
    world = tell(tmp_path, story=BannedWhileSubmitting)
    world.resign("submit.2.closed", lambda m: m.banned.__delitem__(slice(None)), c.WindowClosed)
    first = look(world, tmp_path).first
    assert first is not None
    assert (first.check, first.cycle) == ("windows", 2)
    assert "banned" in first.what


def test_a_ban_that_nobody_ordered_is_found(tmp_path: Path) -> None:
    found = admission(tell(tmp_path, story=BannedByNobody).evidence()).differences
    assert [difference.miner for difference in found] == [MINERS["B"], MINERS["B"]]
    assert "neither an operator nor the run's customer" in found[0].what


def becomes(told: r.MinerEnrolled, message: r.MinerEnrolled) -> None:
    message.CopyFrom(told)


@pytest.mark.parametrize(
    ("issuer", "run", "uses", "expires", "fault"),
    [
        ("operator", "", 4, 10**15, ""),
        ("customer", RUN, 4, 10**15, ""),
        ("operator", "another", 4, 10**15, "is for run 'another'"),
        ("miner A", RUN, 4, 10**15, "signed by neither"),
        ("operator", RUN, 4, 1, "has expired"),
        ("operator", RUN, 3, 10**15, "is for 3, and this is one more"),
    ],
)
def test_invites_are_checked_again(tmp_path: Path, issuer: str, run: str, uses: int, expires: int, fault: str) -> None:
    invite = invites.parse(
        invites.issue(identity(issuer), r.Invite(id="i1", run=run, uses=uses, expires_unix_ms=expires))
    )

    def by_invitation(created: r.RunCreated) -> None:
        created.spec.enrolment.mode = "invite"
        created.CopyFrom(ordered(created.spec, identity("customer")))

    world = tell(tmp_path)
    world.resign("run.0.created", by_invitation, r.RunCreated)
    for name in MINERS:
        asked = enrolment(RUN, identity(f"miner {name}"), f"miner-{name}", invite=invite)
        world.resign(f"run.0.miner.{{{name}}}", partial(becomes, asked), r.MinerEnrolled)
    found = admission(world.evidence()).differences
    assert bool(found) == bool(fault)
    assert all(fault in difference.what for difference in found)


def more_emission(created: r.RunCreated) -> None:
    created.spec.emission += 1


def kinder(created: r.RunCreated) -> None:
    created.spec.scoring.retention_margin = 9.0


def what_was_left_out(created: r.RunCreated) -> None:
    """The customer left a policy to the defaults, and the operator took another one."""
    asked = r.RunSpec()
    asked.CopyFrom(created.spec)
    created.order.CopyFrom(seal(identity("customer"), ORDER_SUBJECT, asked))
    fill(created.spec)
    created.spec.windows.floor_seconds += 1


def somebody_elses(created: r.RunCreated) -> None:
    created.CopyFrom(ordered(created.spec, identity("miner A")))
    created.spec.customer = identity("customer").public


def nobodys(created: r.RunCreated) -> None:
    created.ClearField("order")


def test_defaults_for_what_the_customer_left_out_are_what_it_asked_for(tmp_path: Path) -> None:
    (created,) = [fact.message for fact in [tell(tmp_path).evidence().facts.created_fact] if fact is not None]
    assert created.order.ByteSize()
    fill(created.spec)
    check_asked(created)


@pytest.mark.parametrize("change", [more_emission, kinder, what_was_left_out, somebody_elses, nobodys])
def test_rules_that_the_customer_did_not_ask_for_are_the_operators(
    tmp_path: Path, change: Callable[[r.RunCreated], None]
) -> None:
    world = tell(tmp_path)
    assert look(world, tmp_path).differences == []
    world.resign("run.0.created", change, r.RunCreated)
    found = [one for one in admission(world.evidence()).differences if one.where == "run.0.created"]
    assert [one.by for one in found] == ["operator"]


def test_a_place_that_the_run_does_not_have_is_found(tmp_path: Path) -> None:
    def few(created: r.RunCreated) -> None:
        created.spec.enrolment.max_miners = 3
        created.CopyFrom(ordered(created.spec, identity("customer")))

    world = tell(tmp_path)
    world.resign("run.0.created", few, r.RunCreated)
    assert [one.miner for one in admission(world.evidence()).differences] == [MINERS["L"]]


def test_a_token_that_was_cut_or_changed_is_none() -> None:
    token = invites.issue(Identity.generate(), r.Invite(id="i1", uses=1))
    for broken in ("", token[:-9], "x" * 5000, "not base64!", token[:40] + "A" + token[41:]):
        with pytest.raises(Invalid) as caught:
            invites.verify(invites.parse(broken), RUN, "", tell_roster(), 0)
        assert caught.value.reason == reasons_pb2.REASON_INVITE_INVALID


def tell_roster() -> Roster:
    from tests.unit.connito.audit.world import ROSTER

    return ROSTER


STRANGER = identity("who never asked")


def of_another_run() -> r.MinerEnrolled:
    told = enrolment("another", STRANGER)
    told.run = RUN
    return told


@pytest.mark.parametrize(
    "told",
    [
        r.MinerEnrolled(run=RUN, miner=STRANGER.public),
        of_another_run(),
        r.MinerEnrolled(run=RUN, miner=STRANGER.public, label="thief", order=enrolment(RUN, STRANGER, "mine").order),
        r.MinerEnrolled(run=RUN, miner=STRANGER.public, order=enrolment(RUN, identity("miner A")).order),
        r.MinerEnrolled(run=RUN, miner=STRANGER.public, order=ordered(r.RunSpec(run=RUN), STRANGER).order),
    ],
    ids=["no order", "of another run", "another label", "another's", "another order"],
)
def test_nobody_is_enrolled_who_did_not_ask(tmp_path: Path, told: r.MinerEnrolled) -> None:
    """By whatever the operator signs: it takes no place, is named as doing nothing in no cycle, and the operator is to blame."""
    world = tell(tmp_path)
    world.publish("run", 0, "miner", told, STRANGER.public, signer="coordinator")
    evidence = world.evidence()
    assert STRANGER.public not in evidence.facts.miners
    (found,) = [one for one in signatures(evidence).differences if "head" not in one.where]
    assert (found.by, STRANGER.public[:6] in found.where) == ("operator", True)
