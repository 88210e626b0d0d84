"""Organisations: whose members may submit and cancel, and how many runs theirs may have under way."""

from __future__ import annotations

from collections.abc import Mapping

from connito.errors import Invalid
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import RunSpec
from connito.wire.facts import RunFacts
from connito.wire.roster import OWNER, Roster


def check_submission(spec: RunSpec, customer: str, roster: Roster, runs: Mapping[str, RunFacts]) -> None:
    """Raise `Invalid` (NOT_PERMITTED, QUOTA_EXCEEDED) where the customer's organisation does not let it submit this run now.

    A run counts for the organisation of whoever submitted it, whether or not the run names one: else leaving the name out would
    be a way around the quota. A key of no organisation is a customer of its own, as the roster says.
    """
    if roster.only_reads(customer):
        raise Invalid(
            f"{customer} is a reader of its organisation; an owner or submitter of it submits, or the operator changes that",
            reason=reasons_pb2.REASON_NOT_PERMITTED,
        )
    for organisation in sorted(roster.memberships(customer)):
        quota = roster.quotas.get(organisation)
        members = roster.organisations[organisation]
        under_way = sorted(
            run for run, facts in runs.items() if run != spec.run and _counts(facts, organisation, members)
        )
        if quota is not None and len(under_way) >= quota:
            shown = ", ".join(under_way[:5])
            raise Invalid(
                f"{organisation} may have {quota} runs under way and has {len(under_way)}{f' ({shown})' if shown else ''}; wait "
                "for one to end, cancel one, or ask the operator for more",
                reason=reasons_pb2.REASON_QUOTA_EXCEEDED,
            )


def _counts(facts: RunFacts, organisation: str, members: frozenset[str]) -> bool:
    """Return whether a run is under way for an organisation: submitted by a member, or in its name by one who has left."""
    spec = facts.spec
    return spec is not None and facts.ended is None and (spec.customer in members or spec.organisation == organisation)


def may_cancel(spec: RunSpec, signer: str, roster: Roster) -> bool:
    """Return whether a key may end a run: its customer, unless that is a reader now, or an owner of the organisation."""
    own = {spec.organisation} if spec.organisation else roster.memberships(spec.customer)
    if any(roster.duty(organisation, signer) == OWNER for organisation in own):
        return True
    return signer == spec.customer and not roster.only_reads(signer)
