"""Admission to a run. Pure: facts, policy and time are arguments."""

from __future__ import annotations

from connito.errors import Invalid
from connito.protocol.bans import refusal, standing
from connito.v1 import reasons_pb2, run_pb2, services_pb2
from connito.views.sentences import sentence
from connito.wire.facts import RunFacts
from connito.wire.invites import needs_invite, verify
from connito.wire.passes import admitted
from connito.wire.roster import OPERATOR, ROLES, Roster
from connito.wire.subjects import INSTALLATION

MAX_LABEL = 80


def check_key(command: services_pb2.EnrolMinerCommand, miner: str, roster: Roster) -> None:
    """Raise `Invalid` for a label that cannot be shown, or a key that judges, merges or keeps the books."""
    if len(command.label) > MAX_LABEL or not command.label.isprintable():
        raise Invalid(f"label may have up to {MAX_LABEL} printable characters; shorten it")
    for role in (*ROLES, OPERATOR):
        # A customer may compete.
        if role != "customer" and roster.permits(role, miner):
            raise Invalid(
                f"this key is a {role}'s and cannot mine; make another with `connito miner init`",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )


def check_pass(token: str, miner: str, roster: Roster) -> None:
    """Raise `Invalid` (NOT_PERMITTED) for a key that nobody has admitted, where the roster says who admits."""
    if roster.admits and not admitted(token, miner, roster.admits):
        raise Invalid(
            f"{miner} has no pass of this installation; ask its operator for one, and `connito miner join` puts it into "
            "the key file",
            reason=reasons_pb2.REASON_NOT_PERMITTED,
        )


def check_ban(facts: RunFacts, everywhere: RunFacts, miner: str) -> None:
    """Raise `Invalid` (BANNED) for a key that is banned here, or everywhere and not readmitted here since."""
    for ban in (standing(facts, miner), standing(everywhere, miner)):
        if ban is not None:
            if ban.lifted:
                return
            raise Invalid(sentence(refusal(ban).finding), reason=reasons_pb2.REASON_BANNED)


def invite_for(
    facts: RunFacts, command: services_pb2.EnrolMinerCommand, miner: str, roster: Roster, now_ms: int
) -> run_pb2.Invite | None:
    """Return the invite that has to be used up for the key to get in; None when it needs none.

    Raises `Invalid` (NOT_INVITED, INVITE_INVALID, RUN_FULL) saying what is missing.
    """
    spec = facts.require_spec()
    if spec.enrolment.max_miners and len(facts.miners) >= spec.enrolment.max_miners:
        raise Invalid(
            f"run {facts.run} has its {spec.enrolment.max_miners} miners; look for another with `connito job list`",
            reason=reasons_pb2.REASON_RUN_FULL,
        )
    if not needs_invite(spec.enrolment, miner):
        return None
    if not command.HasField("invite"):
        raise Invalid(
            "this run is by invitation; ask its customer or the operator for a token and pass it with `--invite`",
            reason=reasons_pb2.REASON_NOT_INVITED,
        )
    return verify(command.invite, facts.run, spec.customer, roster, now_ms)


def free_use(invite: run_pb2.Invite, log: RunFacts, miner: str) -> run_pb2.InviteUsed | None:
    """Return the next use of an invite to write down; None when this key holds one. Raises `Invalid` when all are
    taken.

    The broker admits each number once, so that two coordinators cannot both give the last one away.
    """
    used = {
        fact.message.number: fact.message.miner
        for fact in log.invites_used.values()
        if fact.message.invite == invite.id
    }
    if miner in used.values():
        return None
    number = next((n for n in range(1, invite.uses + 1) if n not in used), 0)
    if not number:
        raise Invalid(
            f"the invite was for {invite.uses} and is used up; ask for another",
            reason=reasons_pb2.REASON_INVITE_INVALID,
        )
    return run_pb2.InviteUsed(run=invite.run or INSTALLATION, invite=invite.id, number=number, miner=miner)
