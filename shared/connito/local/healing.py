"""Put objects back that the store has lost or damaged, where a cache of this machine has them whole."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from connito.client.cleaning import references
from connito.client.waiting import Wait
from connito.errors import ConnitoError
from connito.store import ArtifactStore
from connito.store.cache import Cache, digest_of_file
from connito.store.named import ref_of_key
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts

_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass
class Healer:
    """The store of an installation, its caches, and what is known of the run that goes on."""

    store: ArtifactStore
    caches: tuple[Cache, ...]
    facts: RunFacts | None = None

    async def heal(self, waits: Iterable[Wait]) -> list[str]:
        """Put back what is waited for, and return what was done in sentences. What no cache has stays as it is."""
        wanted = [wait for wait in waits if wait.dependency == "object"]
        named = {digest: wait.service for wait in wanted for digest in _DIGEST.findall(wait.error)}
        done = []
        for digest, service in named.items():
            path = await asyncio.to_thread(self._whole, digest)
            with suppress(ConnitoError, OSError):
                if path is not None and (ref := await self._reference(digest, path)) is not None:
                    await self.store.put_file(path, ref.media_type, known=ref, anew=True)
                    done.append(f"put {digest} back, which {service} waits for: the store had lost or damaged it")
        return done

    async def _reference(self, digest: str, path: Path) -> ArtifactRef | None:
        """Return the reference to an object: the log names it, or the store still lists what it has damaged."""
        for fact in () if self.facts is None else self.facts.facts.values():
            for ref in references(fact.message):
                if ref.digest == digest:
                    return ref
        found = next((one for one in await self.store.objects() if one.digest == digest), None)
        return (
            None
            if found is None
            else ref_of_key(found.key, path.stat().st_size, await self.store.media_type(found.key))
        )

    def _whole(self, digest: str) -> Path | None:
        for cache in self.caches:
            path = cache.path(ArtifactRef(digest=digest))
            with suppress(OSError):
                if digest_of_file(path)[0] == digest:
                    return path
        return None
