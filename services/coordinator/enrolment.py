"""Admission to a run. Pure: facts, policy and time are arguments."""

from __future__ import annotations

from collections.abc import Mapping

from connito.errors import Invalid
from connito.protocol.bans import refusal, standing
from connito.render import formats
from connito.v1 import reasons_pb2, run_pb2, services_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.views.sentences import sentence
from connito.wire.facts import RunFacts
from connito.wire.invites import needs_invite, unverified, verify
from connito.wire.passes import admitted
from connito.wire.roster import OPERATOR, ROLES, Roster
from connito.wire.subjects import INSTALLATION

MAX_LABEL = 80


def check_label(label: str) -> None:
    """Raise `Invalid` for a label that cannot be shown."""
    if len(label) > MAX_LABEL or not label.isprintable():
        raise Invalid(f"label may have up to {MAX_LABEL} printable characters; shorten it")


def check_key(miner: str, roster: Roster) -> None:
    """Raise `Invalid` (NOT_PERMITTED) for a key that judges, merges or keeps the books."""
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


def may_ask(facts: RunFacts, command: services_pb2.EnrolMinerCommand, miner: str, roster: Roster, now_ms: int) -> bool:
    """Return whether a key may take part, as far as it goes by who it is: what else bars it may be told to it."""
    spec = facts.require_spec()
    try:
        if facts.is_enrolled(miner) or not needs_invite(spec.enrolment, miner):
            return True
        return command.HasField("invite") and bool(verify(command.invite, facts.run, spec.customer, roster, now_ms))
    except Invalid:
        return False


def invite_for(
    facts: RunFacts, command: services_pb2.EnrolMinerCommand, miner: str, roster: Roster, now_ms: int
) -> run_pb2.Invite | None:
    """Return the invite that has to be used up for the key to get in; None when it needs none.

    Raises `Invalid` (NOT_INVITED, INVITE_INVALID, RUN_FULL) saying what is missing.
    """
    spec = facts.require_spec()
    if spec.enrolment.max_miners and len(facts.miners) >= spec.enrolment.max_miners:
        raise Invalid(
            f"run {facts.run} has its {formats.count(spec.enrolment.max_miners, 'miner')}; "
            f"look for another with `connito job list`",
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


def admitting(envelope: Envelope, runs: Mapping[str, RunFacts], roster: Roster, now_ms: int) -> run_pb2.Invite:
    """Return the invite for which a key is let in to the bus. Raises `Invalid` (INVITE_INVALID) saying what is wrong.

    An operator's is for every run or one; a customer's is for a run of its own that has not ended.
    """
    named = unverified(envelope).run
    facts = runs.get(named, RunFacts(named))
    spec = facts.spec
    invite = verify(envelope, named, "" if spec is None else spec.customer, roster, now_ms)
    if named and (spec is None or facts.ended is not None):
        raise Invalid(
            f"the invite is for run {named!r}, which is not going on; ask for a new one",
            reason=reasons_pb2.REASON_INVITE_INVALID,
        )
    return invite


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


def used_at_ms(invite: run_pb2.Invite, log: RunFacts, miner: str) -> int:
    """Return when a key that holds a use of an invite took it (Unix ms, by the broker's clock)."""
    uses = (
        fact for fact in log.invites_used.values() if (fact.message.invite, fact.message.miner) == (invite.id, miner)
    )
    return next(uses).time_unix_ms
