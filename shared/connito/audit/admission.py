"""Checks of admission: enrolments against the run's policy, and bans against their orders. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from connito.audit.differences import Difference, Step
from connito.audit.evidence import Evidence
from connito.errors import Invalid
from connito.protocol import bans
from connito.v1 import run_pb2
from connito.wire import invites
from connito.wire.fact import Fact

# An invite may expire while its use is being written down.
TOLERANCE_MS = 10_000


def admission(evidence: Evidence) -> Step:
    """Check that every enrolled miner was named or had a valid invite, and that every ban was ordered by an authorised key."""
    facts = evidence.facts
    enrolled, banned = facts.enrolled, facts.bans
    found = [*_enrolments(evidence, enrolled), *_bans(evidence, banned)]
    return Step("admission", 0, len(enrolled) + len(banned), tuple(found))


def _enrolments(evidence: Evidence, enrolled: Mapping[str, Fact[run_pb2.MinerEnrolled]]) -> Iterator[Difference]:
    spec = evidence.facts.require_spec()
    used: dict[str, set[str]] = {}
    for miner, fact in enrolled.items():
        message = fact.message
        try:
            if invites.needs_invite(spec.enrolment, miner):
                invite = invites.verify(
                    message.invite, evidence.run, spec.customer, evidence.roster, fact.time_unix_ms - TOLERANCE_MS
                )
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
