"""A version's coded step: what it decodes to, which is all of it that is recomputed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from connito.audit.artifacts import Artifacts
from connito.errors import Invalid
from connito.protocol.coding import decode_to, step_codec
from connito.v1 import cycle_pb2
from connito.wire.facts import RunFacts


def step_fault(facts: RunFacts, artifacts: Artifacts, version: cycle_pb2.VersionPublished, *, wanted: bool) -> str:
    """Return what is wrong with a version's coded step, which has to lead from its parent to its state to the bit.

    wanted: there has to be one. Its bytes may differ from those that are made here: another library compresses otherwise.
    """
    how, there = step_codec(facts.require_spec().merging), version.HasField("step")
    if there != wanted:
        return f"step: {'one' if wanted else 'none'} recomputed, {'one' if there else 'none'} in the log"
    if not there or how is None:
        return ""
    opened = facts.window("train", version.cycle).require_opened()
    with tempfile.TemporaryDirectory(prefix="connito-step-") as folder:
        try:
            parent, step = artifacts.path(opened.state), artifacts.path(version.step)
            digest, _ = decode_to(Path(folder) / "state", how, step, parent)
        except Invalid as error:
            return f"step: cannot be decoded: {error}"
    return "" if digest == version.state.digest else f"step: leads to {digest!r}, {version.state.digest!r} in the log"
