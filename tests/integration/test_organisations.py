"""Organisations as their members and the operator meet them: commands, a broker, and a coordinator that is not restarted."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from connito.errors import ConnitoError, Invalid
from connito.service import rpc
from connito.v1 import reasons_pb2, services_pb2
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.passes import parse

from tests.integration import test_coordinator
from tests.integration.test_invites import House, house
from tests.support.waiting import PATIENCE

__all__ = ["house"]
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


async def enlisted(house: House, name: str, duty: str, *more: str) -> Identity:
    """A key of one's own, by the command that an operator types; the broker is told nothing."""
    identity = Identity.generate(name.encode().ljust(32))
    told = await house.verb(
        "access", "enlist", str(house.access.folder), "clinic", identity.public, "--as", duty, *more
    )
    return identity.with_passes(parse(told["passes"][identity.public], identity.public))


async def create(house: House, run: str, who: Identity) -> None:
    spec = test_coordinator.spec(run)
    spec.base.name = f"tiny-{who.public[1:9].lower()}"
    # Text and base of its own: those of another customer it may not name.
    for ref in (
        spec.base.manifest,
        *(one.artifact for one in (spec.probe, spec.train, spec.holdout, *spec.general_holdouts)),
    ):
        ref.digest = hashlib.sha256(f"{who.public} {ref.digest}".encode()).hexdigest()
    envelope = seal(who, "rpc.CreateRun", spec)
    await rpc.call(house.stub.CreateRun, services_pb2.CreateRunRequest(envelope=envelope))


async def cancel(house: House, run: str, who: Identity) -> None:
    envelope = seal(who, "rpc.CancelRun", services_pb2.CancelRunCommand(run=run))
    await rpc.call(house.stub.CancelRun, services_pb2.CancelRunRequest(envelope=envelope))


async def test_members_do_what_their_duty_says_and_no_more(house: House, tmp_path: Path) -> None:
    ann = await enlisted(house, "ann", "owner", "--max-runs", "1")
    sam, rex = await enlisted(house, "sam", "submitter"), await enlisted(house, "rex", "reader")
    # Before the roster reaches the coordinator nobody of them is anybody.
    with pytest.raises(Invalid, match="not a customer"):
        await create(house, "o0", ann)
    (tmp_path / "c" / "roster.json").write_text((house.access.folder / "roster.json").read_text())
    assert (await house.bus(rex)).connected
    with pytest.raises(Invalid, match="reader"):
        await until_known(house, rex)
    await create(house, "o1", sam)
    for member in (sam, ann):
        with pytest.raises(Invalid, match="o1") as caught:
            await create(house, "o2", member)
        assert caught.value.reason == reasons_pb2.REASON_QUOTA_EXCEEDED
    await create(house, "o3", house.key("customer"))
    for member, run in ((rex, "o1"), (ann, "o3")):
        with pytest.raises(Invalid, match="belongs to another"):
            await cancel(house, run, member)
    await cancel(house, "o1", ann)
    await create(house, "o2", ann)

    await house.verb("access", "dismiss", str(house.access.folder), ann.public, "--bus", house.server.url)
    with pytest.raises(ConnitoError):
        await house.bus(ann)
    acts = await house.verb("access", "acts", str(house.access.folder))
    assert [act["act"] for act in acts["acts"]] == ["export", "enlist", "enlist", "enlist", "dismiss"]


async def until_known(house: House, reader: Identity) -> None:
    """Ask until the coordinator has taken the new roster over."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await create(house, "o1", reader)
            except Invalid as error:
                if "not a customer" not in str(error):
                    raise
            await asyncio.sleep(0.05)
