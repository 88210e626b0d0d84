from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.protocol.tenancy import check_submission, may_cancel
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import RunSpec
from connito.wire.roster import Roster

from tests.support.run import Run

ANN, SAM, REX, OUT, COURT = "UANN", "USAM", "UREX", "UOUT", "UCOURT"


def roster(**quotas: int) -> Roster:
    clinic = frozenset({ANN, SAM, REX})
    duties = {"clinic": {ANN: "owner", REX: "reader"}, "court": {COURT: "owner"}}
    organisations = {"clinic": clinic, "court": frozenset({COURT})}
    customers = {"customer": clinic | {OUT, COURT}}
    return Roster(customers, organisations=organisations, duties=duties, quotas=quotas)


def runs(*customers: str, organisation: str = "", over: bool = False) -> dict[str, Run]:
    made = {}
    for number, customer in enumerate(customers):
        name = f"r{number}{organisation}"
        made[name] = Run(name=name).created(customer=customer, organisation=organisation)
        if over:
            made[name].ended()
    return made


def submit(customer: str, roster: Roster, before: dict[str, Run], run: str = "new") -> None:
    spec = RunSpec(run=run, customer=customer)
    check_submission(spec, customer, roster, {name: one.facts for name, one in before.items()})


def test_readers_submit_nothing_and_who_is_of_no_organisation_is_its_own() -> None:
    for customer in (ANN, SAM, OUT):
        submit(customer, roster(), {})
    with pytest.raises(Invalid, match="reader") as caught:
        submit(REX, roster(), {})
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED


def test_a_quota_counts_what_every_member_has_under_way() -> None:
    two = roster(clinic=2)
    submit(SAM, two, runs(ANN) | runs(SAM, ANN, over=True, organisation="clinic"))
    with pytest.raises(Invalid, match=r"2 runs under way and has 2 \(r0, r1\)") as caught:
        submit(SAM, two, runs(ANN, SAM))
    assert caught.value.reason == reasons_pb2.REASON_QUOTA_EXCEEDED
    # By who has left, in its name; and others' runs count for others.
    with pytest.raises(Invalid, match="has 2"):
        submit(SAM, two, runs("UGONE", "UGONE", organisation="clinic"))
    for unlimited in (OUT, COURT):
        submit(unlimited, two, runs(ANN, SAM))
    # Again with the same spec is fine.
    submit(SAM, two, runs(ANN, SAM), run="r1")
    with pytest.raises(Invalid, match="may have 0"):
        submit(ANN, roster(clinic=0), {})


def test_an_owner_cancels_what_is_the_organisations_and_nobody_elses() -> None:
    for customer, organisation, allowed in (
        (SAM, "", {SAM, ANN}), (SAM, "clinic", {SAM, ANN}), (REX, "", {ANN}), (OUT, "", {OUT}), (COURT, "court", {COURT}),
        ("UGONE", "clinic", {ANN, "UGONE"}),
    ):  # fmt: skip
        spec = RunSpec(run="r", customer=customer, organisation=organisation)
        may = {key for key in (ANN, SAM, REX, OUT, COURT, "UGONE", "USTRANGER") if may_cancel(spec, key, roster())}
        assert may == allowed, (customer, organisation)
