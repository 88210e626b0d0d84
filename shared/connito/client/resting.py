"""The library of a platform at rest: read from the shelf, onto which it is copied first; nothing runs, and nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from connito.client.connection import Connection
from connito.client.library import Library
from connito.client.mirror import mirror
from connito.errors import NotFound
from connito.library.artifact import RECORD_FILE
from connito.library.attestation import ATTESTATION_FILE
from connito.library.governance import Viewer, attribute
from connito.library.scores import as_messages
from connito.library.shelf import Shelf
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.services_pb2 import ExpertSummary
from connito.views.notebook import Expert, Rows
from connito.wire.identity import Identity

if TYPE_CHECKING:
    from connito.library.governance import Standing
    from connito.library.hits import Hit
    from connito.platform.datadir import DataDir


class RestingLibrary(Library):
    """The reading half of `Library`, without its service. Writing raises `NotFound`, which says how to start one."""

    def __init__(self, connection: Connection, data: DataDir, identity: Identity) -> None:
        """Read the library of `data` as `identity` may see it."""
        super().__init__(connection)
        self._data, self._viewer = data, Viewer(identity.public)

    def list(self) -> Sequence[ExpertSummary]:
        """Return every expert in the order of deposit."""
        from connito.library.hits import visible

        with self._shelf().index() as index:
            names = [name for _, name in visible(index, self._viewer, limit=-1)]
        return Rows(self.show(name)[0] for name in names)

    def search(self, text: str = "", *, domain: str = "", everything: bool = False, limit: int = 20) -> Sequence[Hit]:
        """Find experts by words and domain, best first."""
        from connito.library.hits import search

        with self._shelf().index() as index:
            return Rows(search(index, text, domain=domain, viewer=self._viewer, everything=everything, limit=limit))

    def show(self, expert_id: str) -> Expert:
        """Return one expert and its record. Raises `NotFound` for an unknown id."""
        folder, record = self._shelf().get(expert_id)
        if not self._viewer.sees(record):
            raise NotFound(f"there is no expert {expert_id!r} in this library; see `connito library list`")
        with self._shelf().index() as index:
            rows = index.select("SELECT deposited_at FROM experts WHERE expert_id = ?", (expert_id,))
            standing = index.standing(expert_id)
        data, expert = (folder / RECORD_FILE).read_bytes(), record["expert"]
        summary = ExpertSummary(
            expert_id=expert_id,
            run=record["run"],
            domain=record["domain"],
            base_digest=record["base"]["manifest"],
            expert=ArtifactRef(digest=expert["digest"], size=expert["bytes"]),
            record=ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=len(data)),
            deposited_at_unix_ms=next((int(at) for (at,) in rows), 0),
            files=[ArtifactRef(digest=e["digest"], size=e["bytes"]) for e in record.get("files", {}).values()],
            status=standing.status,
            reason=standing.reason,
            scores=as_messages(record),
        )
        return Expert(summary, record)

    def attestation(self, expert_id: str) -> str:
        """Return the signatures behind an expert; empty for deposits older than they are."""
        self.show(expert_id)
        file = self._shelf().path(expert_id) / ATTESTATION_FILE
        return file.read_text() if file.is_file() else ""

    def standing(self, expert_id: str) -> Standing:
        """Return what the library said about an expert last."""
        self.show(expert_id)
        with self._shelf().index() as index:
            return index.standing(expert_id)

    def ledger(self, expert_id: str) -> dict[str, Any]:
        """Return the uses of an expert on this shelf by verb, and whom they are credited to. Raises `NotFound`."""
        _, record = self.show(expert_id)
        with self._shelf().index() as index:
            uses = index.usage(expert_id)
            credit = attribute(record, sum(uses.values()), index.lookup)
        return {"uses": uses, "credited": credit.units, "uncredited": credit.uncredited}

    def _shelf(self) -> Shelf:
        shelf = Shelf(self._data.root / "shelf")
        mirror(self._data, shelf)
        return shelf
