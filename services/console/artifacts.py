"""Artifacts that the log names: bytes in the store, read for checks, and the cards of experts."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass

from connito.errors import ConnitoError, Invalid
from connito.library.card import render
from connito.library.record import CARD_MEDIA_TYPE
from connito.library.schema import ExpertRecord, read_record
from connito.store import ArtifactStore
from connito.store.named import beside
from connito.v1.artifacts_pb2 import REALM_PRIVATE, ArtifactRef

CHUNK_BYTES = 4 << 20
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Check:
    """The result, as a sentence, of checking the store for the bytes that the log names."""

    holds: bool
    text: str


@dataclass(frozen=True)
class About:
    """The card of an expert, or why there is none, and its record where it could be read."""

    card: str
    record: ExpertRecord | None = None


class Artifacts:
    """The store as a reader with credentials sees it; without any, `available` is False and nothing can be asked."""

    def __init__(self, store: ArtifactStore | None) -> None:
        self._store = store
        # Checking reads all of a model's rows; several at once would only slow each other down.
        self._one_at_a_time = asyncio.Lock()

    @property
    def available(self) -> bool:
        """Return whether there is a store to ask."""
        return self._store is not None

    async def verify(self, ref: ArtifactRef) -> Check:
        """Read an artifact from the store, never from a cache, and compare size and SHA-256."""
        assert self._store is not None
        digest = hashlib.sha256()
        try:
            async with self._one_at_a_time:
                size = await self._store.stat(ref)
                if size is None:
                    return Check(False, "The store does not have it.")
                if size != ref.size:
                    return Check(False, f"The store holds {size} bytes, the log says {ref.size}.")
                if ref.realm == REALM_PRIVATE:
                    return Check(
                        True,
                        f"The store has {ref.size} bytes for it, encrypted for those who may read this run.",
                    )
                for start in range(0, ref.size, CHUNK_BYTES):
                    chunk = await self._store.read_range(ref, start, min(CHUNK_BYTES, ref.size - start))
                    await asyncio.to_thread(digest.update, chunk)
        except ConnitoError as error:
            return Check(False, f"It could not be checked: {error}")
        if digest.hexdigest() != ref.digest:
            return Check(False, f"The store's bytes have another digest, {digest.hexdigest()}.")
        return Check(True, f"The store's {ref.size} bytes have the digest that the log names.")

    async def about(self, record: ArtifactRef) -> About:
        """Return an expert's record with the Markdown card that it names, or a sentence on why it cannot be shown."""
        if self._store is None:
            return About("The card is in the store, and this console has no credentials for it.")
        try:
            if record.size > MAX_RECORD_BYTES:
                raise Invalid(f"the record has {record.size} bytes")
            data = await self._store.get_bytes(record)
            named = json.loads(data).get("card")
            if named is None:
                # What a customer made of experts is described by its record alone.
                made = read_record(data, "the record")
                return About(render(made), made)
            ref = beside(record, str(named["digest"]), int(named["bytes"]), CARD_MEDIA_TYPE)
            if not 0 <= ref.size <= MAX_RECORD_BYTES:
                raise Invalid(f"the card has {ref.size} bytes")
            return About((await self._store.get_bytes(ref)).decode(), _record(data))
        except ConnitoError as error:
            return About(f"The card could not be read: {error}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return About(f"The record does not name a card: {error!r}")


def _record(data: bytes) -> ExpertRecord | None:
    """Return a record; None for one that this version cannot read, whose card is shown all the same."""
    with suppress(Invalid):
        return read_record(data, "the record")
    return None
