"""Put objects back that the store has lost or damaged, where a cache of this machine has them whole."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from connito.client.cleaning import references
from connito.client.waiting import Wait
from connito.errors import ConnitoError
from connito.store import ArtifactStore
from connito.store.cache import Cache, digest_of_file
from connito.store.named import key_of, ref_of_key
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts

AGAIN_SECONDS = 30.0
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass
class Healer:
    """The store of an installation, its caches, and what is known of the run that goes on."""

    store: ArtifactStore
    caches: tuple[Cache, ...]
    facts: RunFacts | None = None
    # When an object was last looked for, on the steady clock: who waits for it asks again some moments after it was put back.
    _looked: dict[str, float] = field(default_factory=dict)

    async def heal(self, waits: Iterable[Wait]) -> list[str]:
        """Put back what is waited for, and return what was done in sentences. What no cache has stays as it is."""
        wanted = [wait for wait in waits if wait.dependency == "object"]
        named = {digest: wait.service for wait in wanted for digest in _DIGEST.findall(wait.error)}
        done = []
        now = time.monotonic()
        for digest, service in named.items():
            if now - self._looked.get(digest, -AGAIN_SECONDS) < AGAIN_SECONDS:
                continue
            self._looked[digest] = now
            path = await asyncio.to_thread(self._whole, digest)
            with suppress(ConnitoError, OSError):
                for ref in [] if path is None else await self._references(digest, path):
                    await self.store.put_file(cast(Path, path), ref.media_type, known=ref, anew=True)
                    line = f"put {digest} back, which {service} waits for: the store had lost or damaged it"
                    done.extend([] if line in done else [line])
        return done

    async def _references(self, digest: str, path: Path) -> list[ArtifactRef]:
        """Return the references to an object, one for each place: the log names it, or the store still lists what it has
        damaged.
        """
        facts = () if self.facts is None else self.facts.facts.values()
        named = [ref for fact in facts for ref in references(fact.message) if ref.digest == digest]
        if not named:
            size, found = path.stat().st_size, [one for one in await self.store.objects() if one.digest == digest]
            named = [ref_of_key(one.key, size, await self.store.media_type(one.key)) for one in found]
        return list({key_of(ref): ref for ref in reversed(named)}.values())

    def _whole(self, digest: str) -> Path | None:
        for cache in self.caches:
            path = cache.path(ArtifactRef(digest=digest))
            with suppress(OSError):
                if digest_of_file(path)[0] == digest:
                    return path
        return None
