"""A run on the tiny base, told by hand: its data in the store, its facts on the bus, and someone who watches."""

from __future__ import annotations

import asyncio
import atexit
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from connito.base.description import build_manifest
from connito.base.tiny import EOS, build_tiny, tiny_texts
from connito.bus import Bus
from connito.data.corpus import Corpus
from connito.data.manifest import Manifest
from connito.data.packing import pack
from connito.data.safetensors_header import SAFETENSORS
from connito.protocol.findings import PROTOCOL_VERSION
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef
from connito.wire.heads import STREAMS, LogTrees
from connito.wire.roster import Roster
from google.protobuf.message import Message

from tests.integration.witness import Witness

TARGET, GENERAL = "recipes", "logs"


@functools.cache
def tiny_base() -> Path:
    """The tiny base, built once per test process."""
    folder = Path(tempfile.mkdtemp(prefix="connito-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_tiny(folder, seed=3)


def corpus(domain: str, seed: int, count: int) -> Corpus:
    """Byte-level documents of a domain."""
    texts = tiny_texts(domain, seed, count)
    return Corpus.from_documents(
        [list(text.encode()) for text in texts], {"domain": domain, "separator": str(EOS), "split": "test"}
    )


@dataclass
class TinyRun:
    """What everybody in the run can refer to."""

    spec: run_pb2.RunSpec
    manifest: Manifest
    selection: run_pb2.SelectionMade
    theta: Path

    @property
    def state(self) -> ArtifactRef:
        """θ_0."""
        return self.selection.initial_state

    @property
    def targets(self) -> dict[int, list[int]]:
        """Selected experts by layer."""
        return {layer.layer: list(layer.experts) for layer in self.selection.layers}


async def prepare(store: ArtifactStore, run: str, folder: Path, *, steps: int = 6) -> TinyRun:
    """Put the base, the corpora and θ_0 into the store. The two most used experts of each layer are selected."""
    base = await asyncio.to_thread(tiny_base)
    manifest = await asyncio.to_thread(build_manifest, base, "tiny")
    for name, entry in manifest.files.items():
        await store.put_file(base / name, entry.media_type, REALM_PUBLIC)

    async def text(domain: str, seed: int, count: int, realm: Any) -> run_pb2.CorpusRef:
        ref = await store.put_bytes(corpus(domain, seed, count).to_bytes(), SAFETENSORS, realm)
        return run_pb2.CorpusRef(domain=domain, artifact=ref)

    spec = run_pb2.RunSpec(
        protocol_version=PROTOCOL_VERSION,
        run=run,
        domain=TARGET,
        cycles=3,
        base=run_pb2.BaseRef(
            name="tiny", manifest=await store.put_bytes(manifest.to_bytes(), "application/json", REALM_PUBLIC)
        ),
        probe=await text(TARGET, 15, 20, REALM_PUBLIC),
        train=await text(TARGET, 11, 40, REALM_PUBLIC),
        holdout=await text(TARGET, 12, 40, REALM_HOLDOUT),
        general_holdouts=[await text(GENERAL, 13, 40, REALM_HOLDOUT)],
        replay=await text(GENERAL, 14, 20, REALM_PUBLIC),
        training=run_pb2.TrainPolicy(
            local_steps=steps,
            sequence_length=64,
            batch_sequences=4,
            learning_rate=2e-3,
            replay_share=0.25,
            moments="second",
        ),
        scoring=run_pb2.ScorePolicy(
            target_sequences=24, general_sequences=8, confidence=0.95, retention_margin=0.05, max_relative_norm=0.5
        ),
        merging=run_pb2.MergePolicy(
            gate_target_sequences=8, gate_general_sequences=4, report_target_sequences=8, report_general_sequences=4
        ),
    )
    theta = folder / "theta.safetensors"
    layers, parameters = await asyncio.to_thread(_select, base, theta)
    selection = run_pb2.SelectionMade(
        run=run,
        layers=layers,
        initial_state=await store.put_file(theta, SAFETENSORS, REALM_PUBLIC),
        target_parameters=parameters,
    )
    return TinyRun(spec, manifest, selection, theta)


def _select(base: Path, theta: Path) -> tuple[list[run_pb2.LayerSelection], int]:
    from connito.base.loading import load_full
    from connito.moe.rows import read_rows
    from connito.moe.state import save_state
    from connito.moe.statistics import collect

    model = load_full(base)
    statistics = collect(model, pack(corpus(TARGET, 15, 20), 64)["token"][:, :-1])
    used = {layer: np.argsort(-of.token_score) for layer, of in statistics.layers.items()}
    rows = read_rows(model, {layer: [int(e) for e in order[:2]] for layer, order in used.items()})
    save_state(rows, theta, {"version": "0"})
    layers = [
        run_pb2.LayerSelection(layer=layer, experts=[int(e) for e in order[:2]], helpers=[int(order[2])])
        for layer, order in used.items()
    ]
    return layers, sum(tensor.numel() for tensor in rows.values())


class Teller(Witness):
    """Writes facts as the coordinator, the committer and the others would, and reads along."""

    buses: dict[str, Bus]

    async def say(
        self, section: str, cycle: int, kind: str, message: Message, id_: str = "", role: str = "coordinator"
    ) -> None:
        """Write a fact."""
        assert await self.buses[role].publish_fact(self.run, section, cycle, kind, message, id_)

    async def open(self, window: str, cycle: int, expected: list[str], state: ArtifactRef) -> None:
        """Open a window; a cycle behind its head."""
        if window == "train":
            await self.say("run", cycle, "head", await self._head(cycle))
        number = cycle_pb2.Window.Value(f"WINDOW_{window.upper()}")
        opened = cycle_pb2.WindowOpened(
            run=self.run, cycle=cycle, window=number, expected=sorted(expected), version=cycle - 1, state=state
        )
        await self.say(window, cycle, "opened", opened)

    async def _head(self, number: int) -> run_pb2.LogHead:
        """Stand for what the broker has of the log."""
        bus, trees = self.buses["coordinator"], LogTrees()
        facts = await self.until(lambda facts: facts.next_head == number, "the heads before")
        async for record in bus.stored(STREAMS, self.run):
            trees.add(record)
        if number > 1:
            trees.checkpoint(facts, number - 1)
        return trees.of(self.run).head(facts, bus.identity)

    async def close(self, window: str, cycle: int, stream: str = "INGRESS", last: int = 0) -> None:
        """Close a window at what the broker has stored by now, or at `last`."""
        last = last or await self.buses["coordinator"].last_sequence(stream)
        closed = cycle_pb2.WindowClosed(run=self.run, cycle=cycle, stream=stream, last_sequence=last)
        await self.say(window, cycle, "closed", closed)


@asynccontextmanager
async def telling(run: str, buses: dict[str, Bus], roster: Roster) -> AsyncIterator[Teller]:
    """A `Teller` that follows the run until the block is left."""
    async with Teller.reading(buses["coordinator"], roster, run) as teller:
        teller.buses = buses
        yield teller
