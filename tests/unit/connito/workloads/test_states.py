"""A state by the coded steps since one that is here: only these are fetched, and what comes out is the state to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from connito.data.codecs.file import codec
from connito.data.tensors import tensor_bytes
from connito.errors import ObjectDamaged, ObjectMissing, Retry
from connito.store import ref_of_bytes
from connito.store.cache import Cache
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.workloads.fetching import fetch_state

from tests.support.run import Run
from tests.support.steps import write_coded_step

NAME = "layers.0.down_proj"
CYCLES = 12


class Store:
    """What was published, fetched through a cache, each fetch noted."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.objects = Cache(folder / "cache"), dict[str, bytes]()
        self.fetched: list[str] = []
        self.damaged: set[str] = set()

    def put(self, data: bytes) -> ArtifactRef:
        ref = ref_of_bytes(data, "", REALM_PUBLIC)
        self.objects[ref.digest] = data
        return ref

    async def fetch(self, ref: ArtifactRef) -> Path:
        def download(target: Path) -> None:
            if ref.digest not in self.objects:
                raise ObjectMissing(f"no {ref.digest}")
            if ref.digest in self.damaged:
                raise ObjectDamaged(f"{ref.digest} is damaged")
            self.fetched.append(ref.digest)
            target.write_bytes(self.objects[ref.digest])

        return self.cache.get(ref, download)

    def bytes(self) -> int:
        return sum(len(self.objects[digest]) for digest in self.fetched)


class Told:
    """A run whose versions are their parents and coded steps; the third cycle kept the incumbent."""

    def __init__(self, folder: Path, dtype: str = "F32") -> None:
        self.store, self.run = Store(folder), Run()
        self.states: list[ArtifactRef] = []
        self.steps: dict[int, ArtifactRef] = {}
        spec = self.run.spec()
        spec.merging.step_codec = "int4"
        self.run.created(spec)
        rng, rows = np.random.default_rng(0), np.zeros((2, 64, 64), np.float32)
        data = tensor_bytes({NAME: self._as(rows, dtype)}, {"said": "once"}, dtypes={NAME: dtype})
        self.states.append(self.store.put(data))
        self.run.selected(initial_state=self.states[0])
        for cycle in range(1, CYCLES + 1):
            self.run.opened("train", cycle, state=self.states[-1], version=cycle - 1)
            if cycle == 3:
                self.run.merged(cycle, state=self.states[-1])
                self.states.append(self.states[-1])
                continue
            rows = rows - (rng.standard_normal(rows.shape) * 0.1).astype(np.float32)
            parent, stepped, out, coded = (folder / name for name in ("parent", "stepped", "out", "coded"))
            parent.write_bytes(self.store.objects[self.states[-1].digest])
            stepped.write_bytes(tensor_bytes({NAME: self._as(rows, dtype)}, dtypes={NAME: dtype}))
            write_coded_step(codec("int4"), parent, stepped, out, coded)
            self.states.append(self.store.put(out.read_bytes()))
            self.steps[cycle] = self.store.put(coded.read_bytes())
            self.run.merged(cycle, state=self.states[-1], step=self.steps[cycle])

    @staticmethod
    def _as(rows: np.ndarray, dtype: str) -> np.ndarray:
        return rows if dtype == "F32" else (rows.view(np.uint32) >> 16).astype(np.uint16)

    async def get(self, cycle: int) -> bytes:
        self.store.fetched.clear()
        found = await fetch_state(self.run.facts, self.states[cycle], self.store.cache, self.store.fetch)
        return found.read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
async def test_who_holds_the_state_before_fetches_the_step_alone(tmp_path: Path, dtype: str) -> None:
    told = Told(tmp_path, dtype)
    await told.get(0)
    assert told.store.fetched == [told.states[0].digest]
    assert await told.get(1) == told.store.objects[told.states[1].digest]
    assert told.store.fetched == [told.steps[1].digest]
    assert told.store.bytes() * (7 if dtype == "F32" else 3) < told.states[1].size
    # Two cycles were missed, of which one changed nothing.
    assert await told.get(4) == told.store.objects[told.states[4].digest]
    assert told.store.fetched == [told.steps[2].digest, told.steps[4].digest]
    assert await told.get(4) == told.store.objects[told.states[4].digest]
    assert told.store.fetched == []


async def test_who_was_away_for_long_or_joins_fetches_what_is_shorter(tmp_path: Path) -> None:
    told = Told(tmp_path)
    await told.get(CYCLES)
    assert told.store.fetched == [told.states[CYCLES].digest]
    (tmp_path / "later").mkdir()
    later = Told(tmp_path / "later")
    await later.get(0)
    steps = [later.steps[cycle] for cycle in sorted(later.steps)]
    assert sum(ref.size for ref in steps) > later.states[0].size > sum(ref.size for ref in steps[:6])
    await later.get(CYCLES)
    assert later.store.fetched == [later.states[CYCLES].digest]


@pytest.mark.parametrize("damage", ["other", "no code", "gone", "damaged", "huge", "parent"])
async def test_a_step_of_no_use_costs_the_whole_state_and_nothing_else(tmp_path: Path, damage: str) -> None:
    told = Told(tmp_path)
    await told.get(0)
    version = told.run.facts.version(1)
    assert version is not None
    if damage == "other":
        version.step.CopyFrom(told.steps[2])
    elif damage == "no code":
        version.step.CopyFrom(told.store.put(b"connito\x01" + bytes(500)))
    elif damage == "gone":
        del told.store.objects[version.step.digest]
    elif damage == "damaged":
        told.store.damaged.add(version.step.digest)
    elif damage == "huge":
        version.step.size = 1 << 60
    else:
        path = told.store.cache.path(told.states[0])
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"\x40")
    assert await told.get(1) == told.store.objects[told.states[1].digest]
    assert told.store.fetched[-1] == told.states[1].digest


async def test_a_store_that_is_away_is_waited_for(tmp_path: Path) -> None:
    told = Told(tmp_path)
    await told.get(0)

    async def away(ref: ArtifactRef) -> Path:
        raise Retry("the store is away")

    with pytest.raises(Retry):
        await fetch_state(told.run.facts, told.states[1], told.store.cache, away)
