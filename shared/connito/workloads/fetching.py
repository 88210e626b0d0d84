"""Fetch what a run is computed on, from the store or from a cache that was filled before: base, states and hold-outs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from connito.data.manifest import Manifest
from connito.errors import Invalid, VerificationFailed
from connito.protocol.coding import decode_to, step_codec
from connito.protocol.sequences import replays
from connito.runtime.logs import get_logger
from connito.store.cache import Cache
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.cycle_pb2 import VersionPublished
from connito.v1.run_pb2 import RunSpec
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.sealing import unsealed

log = get_logger("states")


class Source(Protocol):
    """A source of artifacts: `connito.store.ArtifactStore` over a private cache."""

    async def fetch(self, ref: ArtifactRef) -> Path:
        """Return the verified file. Raises `NotFound` and `VerificationFailed`."""
        ...


@dataclass(frozen=True)
class BaseFiles:
    """A base model's manifest and its files by name."""

    manifest: Manifest
    files: dict[str, Path]


async def fetch_base(source: Source, spec: RunSpec) -> BaseFiles:
    """Fetch the run's base model. Raises what `Source.fetch` raises."""
    manifest = Manifest.load(await source.fetch(spec.base.manifest))
    return BaseFiles(manifest, {name: await source.fetch(entry.ref) for name, entry in manifest.files.items()})


def holdout_refs(spec: RunSpec) -> dict[str, ArtifactRef]:
    """Return the run's held-out corpora by domain, the target first."""
    return {corpus.domain: corpus.artifact for corpus in (spec.holdout, *spec.general_holdouts)}


async def fetch_text(source: Source, facts: RunFacts) -> tuple[Path, Path | None]:
    """Fetch the run's training text, and what miners replay. Raises what `Source.fetch` raises."""
    spec = facts.require_spec()
    replay = await source.fetch(spec.replay.artifact) if replays(spec) else None
    return await source.fetch(spec.train.artifact), replay


async def fetch_holdouts(
    source: Source, spec: RunSpec, me: Identity, lent: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Path]:
    """Fetch the run's held-out corpora by domain, the target first, and open them. Raises what `Source.fetch` raises, and
    `Invalid` where they are sealed to others than `me` and not `lent` to it either.
    """
    found = {}
    for domain, ref in holdout_refs(spec).items():
        path = await source.fetch(ref)
        found[domain] = await asyncio.to_thread(unsealed, path, ref, me, spec.customer, lent)
    return found


async def fetch_state(
    facts: RunFacts, ref: ArtifactRef, cache: Cache, fetch: Callable[[ArtifactRef], Awaitable[Path]]
) -> Path:
    """Return a state of a run as a verified file: from the newest one that is in `cache`, by the coded steps since, where these
    are fewer bytes than it has. Raises what `fetch` raises, which fetches one artifact through that cache.
    """
    way = _steps_to(facts, ref, cache)
    try:
        for version in way:
            await _step(facts, version, cache, await fetch(version.step))
    except Invalid as error:  # also of a store that has lost the step, or keeps it damaged
        log.warning("a state is fetched whole: a coded step to it is of no use", run=facts.run, why=str(error))
    return await fetch(ref)


def _steps_to(facts: RunFacts, ref: ArtifactRef, cache: Cache) -> list[VersionPublished]:
    """Return the versions whose steps lead to a state, in their order; none where it is here, or is shorter than they are."""
    made = {version.state.digest: version for version in facts.versions.values() if version.HasField("step")}
    at, way, size = ref, list[VersionPublished](), 0
    while not cache.path(at).exists():
        version = made.pop(at.digest, None)
        if version is None or (size := size + version.step.size) >= ref.size:
            return []
        way.insert(0, version)
        at = facts.window("train", version.cycle).require_opened().state
    return way


async def _step(facts: RunFacts, version: VersionPublished, cache: Cache, step: Path) -> None:
    how = step_codec(facts.require_spec().merging)
    parent = cache.path(facts.window("train", version.cycle).require_opened().state)

    def write(target: Path) -> None:
        if how is None or decode_to(target, how, step, parent)[0] != version.state.digest:
            raise VerificationFailed(
                f"the coded step of version {version.version} does not lead from the state before to its own; one of the three "
                "is damaged"
            )

    await asyncio.to_thread(cache.get, version.state, write)
    log.info("stepped", run=facts.run, version=version.version, bytes=version.step.size, of=version.state.size)
