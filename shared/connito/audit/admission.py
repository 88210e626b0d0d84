"""Checks of admission: enrolments against the run's policy, bans against their orders, and what votes weigh. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from connito.audit.differences import Difference, Step
from connito.audit.evidence import Evidence
from connito.errors import Invalid
from connito.protocol import bans
from connito.protocol.asked import check_asked
from connito.v1 import run_pb2
from connito.wire import invites
from connito.wire.fact import Fact
from connito.wire.verification import enrol_command

# An invite may expire while its use is being written down.
TOLERANCE_MS = 10_000


def admission(evidence: Evidence) -> Step:
    """Check that the run's rules are its customer's, that every enrolled miner was named or had a valid invite and a place, and
    that every ban was ordered by an authorised key.
    """
    facts = evidence.facts
    enrolled, banned = facts.enrolled, facts.bans
    found = [*_asked(evidence), *_enrolments(evidence, enrolled), *_bans(evidence, banned)]
    return Step("admission", 0, len(enrolled) + len(banned), tuple(found))


def stakes(evidence: Evidence) -> Step:
    """Check that the log says what the vote of each validator weighs. What the roster says now may be another matter."""
    facts, roster = evidence.facts, evidence.roster
    head = facts.head(facts.cycle)
    late = 0 if head is None else head.sequence
    found = [
        Difference("stakes", evidence.subject("run", 0, "stake", key), "is not in the log, but the validator joined")
        for key, fact in facts.joined.items()
        if facts.stake(key) is None and fact.sequence < late
    ]
    others = [
        f"{fact.message.stake:g} for {evidence.name(key)}, this roster says {roster.stake(key):g}"
        for key, fact in facts.stakes.items()
        if fact.message.stake != roster.stake(key)
    ]
    return Step("stakes", 0, len(facts.joined), tuple(found), f"the log counts {'; '.join(others)}" if others else "")


def _asked(evidence: Evidence) -> Iterator[Difference]:
    try:
        check_asked(evidence.facts.require_created())
    except Invalid as error:
        yield Difference("admission", "run.0.created", f"no order bears this out: {error}")


def _enrolments(evidence: Evidence, enrolled: Mapping[str, Fact[run_pb2.MinerEnrolled]]) -> Iterator[Difference]:
    spec = evidence.facts.require_spec()
    used: dict[str, set[str]] = {}
    if (most := spec.enrolment.max_miners) and len(enrolled) > most:
        for miner in sorted(enrolled, key=lambda miner: enrolled[miner].sequence)[most:]:
            what = f"should not have been enrolled: the run is for {most} miners"
            yield Difference("admission", evidence.subject("run", 0, "miner", miner), what, miner=miner)
    for miner, fact in enrolled.items():
        try:
            if invites.needs_invite(spec.enrolment, miner):
                asked, at = enrol_command(fact.message), fact.time_unix_ms - TOLERANCE_MS
                invite = invites.verify(asked.invite, evidence.run, spec.customer, evidence.roster, at)
                used.setdefault(invite.id, set()).add(miner)
                if len(used[invite.id]) > invite.uses:
                    raise Invalid(f"invite {invite.id} is for {invite.uses}, and this is one more")
        except Invalid as error:
            where = evidence.subject("run", 0, "miner", miner)
            yield Difference("admission", where, f"should not have been enrolled: {error}", miner=miner)


def _bans(evidence: Evidence, banned: Mapping[str, Fact[run_pb2.MinerBan]]) -> Iterator[Difference]:
    spec = evidence.facts.require_spec()
    for id_, fact in banned.items():
        try:
            bans.check_order(fact.message, evidence.roster, spec.customer)
        except Invalid as error:
            where = evidence.subject("run", 0, "ban", id_)
            yield Difference("admission", where, f"no order bears this out: {error}", miner=fact.message.miner)
