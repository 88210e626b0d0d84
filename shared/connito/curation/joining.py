"""`connito.library.deposit`: onto the shelf, and what is made of a running platform's experts into its library too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from connito.client import Client
from connito.curation.holdings import Holdings, now_ms, read_folder
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import NotFound
from connito.library.artifact import EXPERT_FILE, MEDIA_TYPE
from connito.library.governance import governance
from connito.library.membership import claimed
from connito.library.record import RECORD_MEDIA_TYPE, encode
from connito.library.schema import ExpertRecord
from connito.platform.session import Session
from connito.runtime.progress import tell
from connito.runtime.tasks import blocking
from connito.service.customer_store import CustomerStore
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.private import at


@dataclass(frozen=True)
class Deposited:
    """A record that was put into a library: onto the shelf, and `on_platform` or else `why` not."""

    record: ExpertRecord
    on_platform: bool = False
    why: str = ""


def deposit(folder: Path, library: Holdings | None = None) -> Deposited:
    """Put an expert, or a model made of experts, onto the shelf; what is made of a running platform's experts becomes one of
    its library's as well, signed by the customer who owns it then.

    Raises `Invalid` for a record that does not follow from its parents'.
    """
    folder, record = read_folder(Path(folder))
    library = library or Holdings()
    local = library.open_shelf(make=True)
    done, attestation = Deposited(record, why="no platform runs here"), None
    if library.shelf is not None:
        done = Deposited(record, why="a shelf was named")
    elif (client := library.platform()) is not None:
        with client:
            done = _join(client, library, folder, record)
            attestation = client.library.attestation(str(record["expert_id"])) if done.on_platform else None
    if (folder / EXPERT_FILE).is_file():
        local.deposit(folder / EXPERT_FILE, done.record, now_ms(), attestation)
    else:
        local.deposit_model(folder, now_ms(), done.record, attestation)
    return done


def _join(client: Client, library: Holdings, folder: Path, record: ExpertRecord) -> Deposited:
    try:
        return Deposited(client.library.show(str(record["expert_id"]))[1], on_platform=True)
    except NotFound:
        if "derived" not in record:
            return Deposited(
                record, why="it is not made of the platform's experts: a run of the platform brings such a one in"
            )
    session = Session.open(library.data_dir, role="customer")
    owned = claimed(record, session.identity.public)
    tell(f"uploading {record['expert_id']} to the platform")
    expert, files, described = blocking(_upload(CustomerStore(session), folder, owned))
    client.library.deposit(expert, described, files)
    return Deposited(owned, on_platform=True)


async def _upload(
    store: CustomerStore, folder: Path, record: ExpertRecord
) -> tuple[ArtifactRef, list[ArtifactRef], ArtifactRef]:
    """Upload what a deposit names; returns the weights, a model's files, and the record."""
    shown = governance(record)["visibility"]
    place = at("" if shown == "public" else (await store.secret(str(record["expert_id"]))).digest)
    described = await store.put_bytes(encode(record), RECORD_MEDIA_TYPE, place)
    if (folder / EXPERT_FILE).is_file():
        return await store.put_file(folder / EXPERT_FILE, MEDIA_TYPE, place), [], described
    kinds = {
        name: SAFETENSORS if name.endswith(".safetensors") else "application/octet-stream" for name in record["files"]
    }
    files = [await store.put_file(folder / name, kind, place) for name, kind in kinds.items()]
    weights = next(ref for ref in files if ref.digest == record["expert"]["digest"])
    return weights, files, described
