"""Put a base model into the store: its files as they are, and a manifest of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from connito.data.manifest import Manifest
from connito.errors import Invalid
from connito.v1 import artifacts_pb2
from connito.v1.artifacts_pb2 import ArtifactRef

if TYPE_CHECKING:
    from connito.service.customer_store import CustomerStore
    from connito.store import ArtifactStore

MANIFEST_TYPE = "application/vnd.connito.base+json"
PUBLIC, HOLDOUT = artifacts_pb2.REALM_PUBLIC, artifacts_pb2.REALM_HOLDOUT


async def upload_base(
    store: ArtifactStore | CustomerStore,
    folder: Path,
    manifest: Manifest,
    progress: Callable[[str, float], None] | None = None,
) -> ArtifactRef:
    """Put a base's files and its manifest into the store; returns the manifest's reference. Raises `Invalid` for a file that is
    not what the manifest says.
    """
    done, total = 0, sum(entry.size for entry in manifest.files.values())
    for entry in manifest.files.values():
        if await store.stat(entry.ref) != entry.size:
            if progress is not None:
                progress("putting the base into the store", done / total)
            put = await store.put_file(folder / entry.name, entry.media_type, PUBLIC)
            if (put.digest, put.size) != (entry.digest, entry.size):
                raise Invalid(
                    f"{folder / entry.name} is not the file that the base was described by: it was changed since, or its disk "
                    "returns other bytes; copy it again, or remove the folder of one that connito built, and begin anew"
                )
        done += entry.size
    if progress is not None:
        progress("putting the base into the store", 1.0)
    return await store.put_bytes(manifest.to_bytes(), MANIFEST_TYPE, PUBLIC)
