"""A base of random weights, big enough to route, and text to route through it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from connito.base.description import build_manifest
from connito.data.corpus import Corpus
from connito.data.manifest import Manifest
from connito.protocol.findings import PROTOCOL_VERSION
from connito.v1 import run_pb2

from tests.support.models import one_thread, random_base, save_random

__all__ = ["one_thread", "random_base"]


@dataclass(frozen=True)
class Inputs:
    """What the selector is given."""

    manifest: Manifest
    files: dict[str, Path]
    probe: Path
    replay: Path
    spec: run_pb2.RunSpec


def corpus(path: Path, domain: str, tokens: np.ndarray) -> Path:
    documents = [list(map(int, part)) for part in np.array_split(tokens, 8)]
    Corpus.from_documents(documents, {"domain": domain, "separator": "256"}).save(path)
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("base")
    save_random(folder / "model")
    rng = np.random.default_rng(0)
    spec = run_pb2.RunSpec(run="run-1", domain="letters", protocol_version=PROTOCOL_VERSION)
    spec.base.name = "random"
    spec.base.manifest.digest = "b" * 64
    spec.training.sequence_length = 16
    spec.selection.MergeFrom(run_pb2.SelectionPolicy(method="esft-token", threshold=0.4, helpers_per_layer=2))
    spec.replay.domain = "digits"
    return Inputs(
        build_manifest(folder / "model", "random"),
        {path.name: path for path in (folder / "model").iterdir()},
        corpus(folder / "probe", "letters", rng.integers(97, 123, 400)),
        corpus(folder / "replay", "digits", rng.integers(48, 58, 400)),
        spec,
    )
