from __future__ import annotations

import json
from pathlib import Path

import pytest
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.platform.access import Access
from connito.wire.identity import Identity
from connito.wire.passes import parse
from connito.wire.roster import Roster

ANN, REX = (Identity.generate(bytes([number]) * 32).public for number in (1, 2))


@pytest.fixture
def access(tmp_path: Path) -> Access:
    access = Access(tmp_path)
    access.export(validators=0)
    return access


def test_members_come_change_and_go(access: Access) -> None:
    own = access.roster().keys["customer"]
    tokens = parse(access.enlist("clinic", ANN, "owner", max_runs=2), ANN)
    assert len(tokens) == 1
    access.enlist("clinic", REX, "submitter")
    access.enlist("clinic", REX, "reader")
    roster = Roster.load(access.folder / "roster.json")
    assert {roster.duty("clinic", key) for key in (ANN, REX)} == {"owner", "reader"}
    assert (roster.quotas, roster.only_reads(REX), roster.only_reads(ANN)) == ({"clinic": 2}, True, False)
    assert roster.keys["customer"] == own | {ANN, REX}
    # What else is done with the folder leaves them there.
    access.rotate("customer")
    access.finish("customer")
    access.export(validators=1)
    assert access.roster().duty("clinic", ANN) == "owner"
    assert access.dismiss(ANN) == "clinic"
    gone = access.roster()
    assert (gone.duty("clinic", ANN), gone.permits("customer", ANN), ANN in access.accounts.revoked) == (
        "",
        False,
        True,
    )
    with pytest.raises(NotFound):
        access.dismiss(ANN)
    access.enlist("clinic", ANN, "submitter")
    assert ANN not in access.accounts.revoked


@pytest.mark.parametrize(
    ("organisation", "duty", "quota", "why"),
    [("court", "owner", None, "belongs to clinic"), ("clinic", "boss", None, "owner, submitter, reader"),
     ("a.b", "owner", None, "."),
     ("", "reader", None, "."), ("clinic", "owner", -1, "quota")],
)  # fmt: skip
def test_what_is_no_membership_is_refused(
    access: Access, organisation: str, duty: str, quota: int | None, why: str
) -> None:
    access.enlist("clinic", ANN, "owner")
    before = (access.folder / "roster.json").read_text()
    with pytest.raises(Invalid, match=why):
        access.enlist(organisation, ANN, duty, quota)
    for other in (access.member("coordinator").key, "nobody"):
        with pytest.raises(Invalid):
            access.enlist("clinic", other, "owner")
    assert (access.folder / "roster.json").read_text() == before


@pytest.mark.parametrize(
    ("duties", "quotas"),
    [({"clinic": {ANN: "admin"}}, {}), ({"clinic": {REX: "owner"}}, {}), ({"court": {ANN: "owner"}}, {}), ({}, {"court": 1}),
     ({}, {"clinic": -1}), ({"clinic": "owner"}, {}), ({}, {"clinic": "many"})],
)  # fmt: skip
def test_a_roster_that_grants_what_is_nothing_is_refused(
    tmp_path: Path, duties: dict[str, object], quotas: dict[str, object]
) -> None:
    raw = {"keys": {}, "organisations": {"clinic": [ANN]}, "organisation_duties": duties, "organisation_quotas": quotas}
    (tmp_path / "roster.json").write_text(json.dumps(raw))
    with pytest.raises(Invalid, match="roster"):
        Roster.load(tmp_path / "roster.json")


def test_every_act_is_signed_and_none_can_be_changed(access: Access) -> None:
    access.add([REX])
    access.revoke([REX])
    access.rotate("operator")
    access.finish("operator")
    access.enlist("clinic", ANN, "reader")
    rows = access.acts.read()
    assert [row["act"] for row in rows] == ["export", "add", "revoke", "rotate operator", "finish operator", "enlist"]
    assert rows[0]["by"] != rows[-1]["by"], "the old operator's key handed over to the new one"
    path, whole = access.acts.path, access.acts.path.read_text().splitlines()
    assert path.stat().st_mode & 0o077 == 0
    stranger = Identity.generate()
    # In every way a line as it should be, but that it is a stranger's.
    body = json.dumps({**rows[-1], "by": stranger.public, "previous": rows[-1]["hash"]})
    forged = json.dumps({"body": body, "signature": stranger.sign(body.encode()).hex()})
    for damaged in (
        [*whole[:2], whole[2].replace("revoke", "admit"), *whole[3:]], [*whole[:1], *whole[2:]], whole[1:],
        [whole[1], whole[0], *whole[2:]], [*whole, forged], [*whole, "{}"], ["null"],
        [*whole, "["],
    ):  # fmt: skip
        path.write_text("".join(f"{line}\n" for line in damaged))
        with pytest.raises(VerificationFailed):
            access.acts.read()
    path.unlink()
    assert access.acts.read() == []


def test_a_record_that_another_key_began_is_none(access: Access, tmp_path: Path) -> None:
    other = Access(tmp_path / "other")
    other.export(validators=0)
    access.acts.path.write_bytes(other.acts.path.read_bytes())
    with pytest.raises(VerificationFailed, match="another key"):
        access.acts.read()
