"""Submissions of a cycle as files to merge: unlocked, decoded, and looked at once more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from numpy.typing import NDArray

from connito.errors import Environment, Invalid
from connito.protocol.claims import claim_of
from connito.protocol.coding import decoded
from connito.protocol.findings import Refusal, Refusals
from connito.protocol.merging.earlier import EarlierWork
from connito.protocol.merging.reading import inspect
from connito.protocol.submission import check_header, expected_layout
from connito.runtime.compute import usable_cores
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts
from connito.wire.locked import unlocked


@dataclass(frozen=True)
class Files:
    """Local files of a cycle's artifacts. `states` and `bases` are by miner; `earlier`: those of `earlier_works`."""

    parent: Path
    momentum: Path | None
    states: Mapping[str, Path]
    bases: Mapping[str, Path]
    earlier: Sequence[EarlierWork] = ()


def in_order(entries: Iterable[cycle_pb2.Submission]) -> list[cycle_pb2.Submission]:
    """Return submissions in the order in which they are merged."""
    return sorted(entries, key=lambda entry: entry.miner)


def opened(
    facts: RunFacts, submissions: Sequence[cycle_pb2.Submission], files: Files, folder: Path
) -> tuple[Files, Refusals, NDArray[np.float64]]:
    """Unlock and decode every submission into `folder` and look at it once more: a version is checked where it is made.

    Return the inner products of earlier works and of those that are in order, too. Without any of now, none is compared.
    """
    spec, layout = facts.require_spec(), expected_layout(files.parent)
    refused: dict[str, Refusal] = {}
    states: dict[str, Path] = {}
    entries = in_order(entry for entry in submissions if entry.miner in files.states)

    def clear(state: Path, artifact: ArtifactRef, base: Path) -> Path:
        # Several may have handed in the same file.
        own = Path(mkdtemp(dir=folder))
        return decoded(unlocked(state, artifact, own), base, spec.training, own)

    def look(entry: cycle_pb2.Submission) -> Path | Refusal:
        try:
            path = clear(files.states[entry.miner], entry.artifact, files.bases[entry.miner])
            claim_of(check_header(path, layout), spec, facts.require_selection())
        except Environment:
            raise
        except Invalid as error:
            return Refusal.of(error)
        return path

    with ThreadPoolExecutor(usable_cores()) as pool:
        for entry, found in zip(entries, pool.map(look, entries), strict=True):
            if isinstance(found, Path):
                states[entry.miner] = found
            else:
                refused[entry.miner] = found
        works = files.earlier if states else []
        plain = pool.map(lambda work: clear(work.state, work.entry.artifact, work.base), works)
        earlier = [replace(work, state=state) for work, state in zip(works, plain, strict=True)]
    bases = [files.bases[miner] for miner in states]
    beside = [work.state for work in earlier], [work.base for work in earlier]
    looked = inspect(list(states.values()), bases, layout, spec.scoring.max_relative_norm or math.inf, beside)
    miners = list(states)
    refused |= {miners[place]: refusal for place, refusal in looked.refused.items()}
    return replace(files, states=states, earlier=earlier), refused, looked.gram
