"""Fetch what a run is computed on, from the store or from a cache that was filled before: the base and the hold-outs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from connito.data.manifest import Manifest
from connito.protocol.sequences import replays
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.run_pb2 import RunSpec
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.sealing import unsealed


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
