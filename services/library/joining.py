"""Take in what customers made of other experts: composed, upgraded, pruned, grown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from connito.bus import Bus
from connito.errors import Invalid, NotFound
from connito.library.artifact import MODEL_FORMAT
from connito.library.attestation import attest_derived
from connito.library.attestation import encode as encode_attestation
from connito.library.governance import Viewer, governance
from connito.library.membership import check_member
from connito.library.schema import ExpertRecord, read_record
from connito.library.shelf import check_expert
from connito.store import ArtifactStore
from connito.v1 import reasons_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.private import at
from connito.wire.subjects import LIBRARY

from .state import Catalogue

if TYPE_CHECKING:
    from connito.v1.envelope_pb2 import Envelope

MAX_RECORD_BYTES = 16 << 20
MAX_FILES = 64
# Of one customer: every run that starts from whatever is best measures among all that are there.
MAX_OWNED = 100


class Joining:
    """Checks a deposit against its parents in the catalogue and publishes it. Doing it twice is doing it once."""

    def __init__(self, catalogue: Catalogue, store: ArtifactStore, bus: Bus) -> None:
        self._catalogue, self._store, self._bus = catalogue, store, bus

    async def take(
        self, command: services_pb2.DepositExpertCommand, envelope: Envelope, viewer: Viewer
    ) -> run_pb2.ExpertDeposited:
        """Publish a deposit. Raises `Invalid` for one that does not follow from experts that `viewer` may use."""
        refs = (command.expert, command.record, *command.files)
        place = at(command.record.secret)
        if (
            any((ref.realm, ref.secret) != (place.realm, place.secret) for ref in refs)
            or len(command.files) > MAX_FILES
        ):
            raise Invalid(
                f"a deposit has at most {MAX_FILES} files, all in one place, and none that is held out or a miner's"
            )
        if place.secret and not await self._store.is_owner(place.secret, viewer.name):
            raise _refused("it is encrypted under another's secret")
        record = await self._record(command.record)
        known = self._catalogue.facts.get(record["expert_id"])
        if known is not None and (known.message.owner, known.message.expert) == (viewer.name, command.expert):
            return known.message
        if known is not None:
            raise _refused(f"{record['expert_id']} is in the library already")
        owned = sum(fact.message.owner == viewer.name for fact in self._catalogue.facts.values())
        if owned >= MAX_OWNED:
            raise _refused(f"you have {owned} derived experts in the library, and {MAX_OWNED} is the most")
        parents = record["derived"]["parents"] if "derived" in record else []
        if not place.secret and governance(record)["visibility"] != "public":
            raise _refused("it is not public, and lies open in the store; deposit it with a client of this version")
        check_member(record, [self._parent(entry["expert_id"], viewer) for entry in parents], viewer.name)
        await self._check_files(record, command)
        message = await self._message(record, command, envelope)
        await self._bus.publish_fact(LIBRARY, "library", 0, "deposited", message, message.expert_id)
        return message

    async def _record(self, ref: ArtifactRef) -> ExpertRecord:
        if ref.size > MAX_RECORD_BYTES:
            raise Invalid(f"a record of {ref.size} bytes is too large: {MAX_RECORD_BYTES} at most")
        return read_record(await self._store.get_bytes(ref), "what you deposit")

    def _parent(self, name: str, viewer: Viewer) -> ExpertRecord:
        """Return the record of a parent that is there and in good standing."""
        try:
            self._catalogue.fact(name, viewer)
        except NotFound as error:
            raise _refused(
                f"its parent {name} is not in this library: deposit that one first, where you may"
            ) from error
        standing = self._catalogue.index.standing(name)
        if standing.status in ("yanked", "opted-out"):
            raise _refused(f"its parent {name} is {standing}; make it again without that one")
        return self._catalogue.index.record(name)

    async def _check_files(self, record: ExpertRecord, command: services_pb2.DepositExpertCommand) -> None:
        expert = record["expert"]
        if (command.expert.digest, command.expert.size) != (expert["digest"], expert["bytes"]):
            raise _refused("the file that you deposit is not the one that its record describes")
        if record["format"] != MODEL_FORMAT:
            if command.files:
                raise _refused("an expert is one file; several are a model's")
            check_expert(await self._store.fetch(command.expert), record)
            return
        named = sorted((entry["digest"], entry["bytes"]) for entry in record.get("files", {}).values())
        if named != sorted((ref.digest, ref.size) for ref in command.files):
            raise _refused("the files that you deposit are not those that the model's record names")
        for ref in command.files:
            if await self._store.stat(ref) != ref.size:
                raise Invalid(f"{ref.digest[:12]}… of this model was not uploaded; deposit it again")

    async def _message(
        self, record: ExpertRecord, command: services_pb2.DepositExpertCommand, envelope: Envelope
    ) -> run_pb2.ExpertDeposited:
        signed = encode_attestation(attest_derived(envelope.SerializeToString()))
        rules = governance(record)
        return run_pb2.ExpertDeposited(
            run=LIBRARY,
            expert_id=record["expert_id"],
            expert=command.expert,
            record=command.record,
            domain=record["domain"],
            base_digest=record["base"]["manifest"],
            parents=record.get("parents", []),
            attestation=await self._store.put_bytes(signed, "application/json", at(command.record.secret)),
            owner=rules["owner"],
            visibility=rules["visibility"],
            organisation=rules["organisation"],
            files=command.files,
        )


def _refused(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_NOT_PERMITTED)
