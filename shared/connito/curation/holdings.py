"""The experts within reach: on a shelf, in the library of the running platform, or in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connito.client import Client
from connito.client.mirror import mirror, shelve
from connito.errors import NotFound, Retry
from connito.library.artifact import EXPERT_FILE, MODEL_FILE, RECORD_FILE
from connito.library.governance import Permission, Standing, Use, Viewer, check_use
from connito.library.schema import ExpertRecord, read_record
from connito.library.shelf import Shelf
from connito.platform.datadir import DataDir
from connito.platform.session import Session
from connito.runtime.progress import tell
from connito.runtime.tasks import blocking
from connito.service.customer_store import CustomerStore
from connito.v1.artifacts_pb2 import ArtifactRef

Expert = tuple[Path, ExpertRecord]  # folder, record


@dataclass(frozen=True)
class Agreement:
    """A user's consent and purpose: licences outside the table that are `accepted`, and what the result is for."""

    accepted: Sequence[str] = ()
    commercial: bool = False
    redistribute: bool = False
    allow_yanked: bool = False


@dataclass(frozen=True)
class Holdings:
    """The places where experts are looked up, and the viewer.

    shelf: folder of a local library, which then is the only one; by default CONNITO_SHELF, or `shelf/` in the data
    directory, together with the library of the platform that runs in `data_dir` or that CONNITO_NATS_URL names.
    """

    shelf: Path | None = None
    data_dir: Path | None = None
    viewer: Viewer = field(default_factory=Viewer)

    def open_shelf(self, *, make: bool = False) -> Shelf:
        """Return the local library. `NotFound` for a folder that was named and is not there, unless to `make` it."""
        given = os.environ.get("CONNITO_SHELF")
        if self.shelf is not None and not make and not self.shelf.is_dir():
            raise NotFound(f"there is no shelf at {self.shelf}; put an expert there with `connito library deposit`")
        data = DataDir.at(self.data_dir)
        beside = Path(given) if given and self.data_dir is None else data.root / "shelf"
        shelf = Shelf(self.shelf or beside)
        if shelf.root == data.root / "shelf" and not os.environ.get("CONNITO_NATS_URL"):
            mirror(data, shelf)
        return shelf

    def platform(self) -> Client | None:
        """Return a client of the platform's library; None where none runs or a shelf was named."""
        if self.shelf is not None:
            return None
        try:
            client = Client.local(self.data_dir)
            client.library.reach()
        except (NotFound, Retry):
            return None
        return client

    def find(self, name: str) -> Expert:
        """Return an expert by folder, or by id: from the shelf, else fetched from the platform onto it."""
        return read_folder(Path(name)) if Path(name).is_dir() else self.by_id(name)

    def by_id(self, name: str) -> Expert:
        """Return an expert by its id, whatever else bears that name: from the shelf, else fetched from the platform onto it."""
        local = self.open_shelf()
        try:
            return local.get(name)
        except NotFound as error:
            tell(f"looking for {name} on the platform")
            try:
                self._fetch(name, local)
            except NotFound as said:
                raise NotFound(f"{error}; {said}" if "CONNITO_NATS_URL" in str(said) else str(error)) from None
            return local.get(name)

    def records(self, known: Container[str] = ()) -> dict[str, ExpertRecord]:
        """Return the records of the experts within reach that are not `known`, whoever may see them, in the order of deposit."""
        with self.open_shelf().index() as index:
            ids = [name for (name,) in index.select("SELECT expert_id FROM experts ORDER BY sequence")]
            found = {name: index.record(name) for name in ids if name not in known}
        if (client := self.platform()) is not None:
            with client:
                for expert in client.library.list():
                    if expert.expert_id not in found and expert.expert_id not in known:
                        found[expert.expert_id] = client.library.show(expert.expert_id).record
        return found

    def permit(
        self,
        experts: Sequence[Expert],
        verb: str,
        agreement: Agreement,
        standings: Mapping[str, Standing] | None = None,
    ) -> Permission:
        """Check a use against what shelf and platform say of these experts, if it was not asked before. Raises `Invalid`."""
        standings = standings or self.standings([str(record["expert_id"]) for _, record in experts])
        use = Use(verb, agreement.commercial, agreement.redistribute, frozenset(agreement.accepted))
        records = [record for _, record in experts]
        return check_use(records, use, standings=standings, viewer=self.viewer, allow_yanked=agreement.allow_yanked)

    def standings(self, names: Sequence[str]) -> dict[str, Standing]:
        """Return what shelf and platform say of experts now; what the platform says against one counts."""
        with self.open_shelf().index() as index:
            standings = {name: index.standing(name) for name in names}
        if (client := self.platform()) is not None:
            with client:
                for name in names:
                    with suppress(NotFound):
                        said = client.library.standing(name)
                        standings[name] = said if said.status != "good" else standings[name]
        return standings

    def meter(self, records: Sequence[Mapping[str, Any]], verb: str, units: int = 1) -> None:
        """Write `units` uses of each expert down: on the shelf, and in the log of the platform that knows the expert."""
        local, client = self.open_shelf(), self.platform()
        for record in records:
            name = str(record["expert_id"])
            local.meter(name, verb, self.viewer.name, now_ms(), units)
            if client is not None:
                with suppress(NotFound):
                    client.library.meter(name, verb, units)
        if client is not None:
            client.close()

    def _fetch(self, name: str, local: Shelf) -> None:
        """Mirror one expert of the platform's library. `NotFound` when none runs here or it has no such expert."""
        store = CustomerStore(Session.open(self.data_dir, role="customer"))
        with Client.local(self.data_dir) as client:
            summary, record = client.library.show(name)
            attestation = client.library.attestation(name)

        async def fetch(ref: ArtifactRef) -> Path:
            return await store.fetch(ref, summary.run)

        blocking(shelve(local, summary, record, fetch, summary.deposited_at_unix_ms, attestation or None))


def read_folder(path: Path) -> Expert:
    """Return an export's folder and record. Raises `NotFound` and `Invalid`."""
    held = (path / EXPERT_FILE).is_file() or (path / MODEL_FILE).is_file()
    if not held or not (path / RECORD_FILE).is_file():
        raise NotFound(
            f"{path} holds no expert: it needs {EXPERT_FILE} and {RECORD_FILE}, as `library export` writes them"
        )
    return path, read_record((path / RECORD_FILE).read_bytes(), path / RECORD_FILE)


def now_ms() -> int:
    """Return milliseconds since 1970."""
    return int(time.time() * 1000)
