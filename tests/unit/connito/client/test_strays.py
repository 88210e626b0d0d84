"""What miners say of runs that do not exist can be dropped, and nothing else is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from connito.bus import Bus, streams
from connito.client import cleaning
from connito.store.named import StoredObject
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire import subjects
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.parts import split
from connito.wire.roster import Roster

MINER = Identity.generate().public
NOW, DAY = 1_000_000.0, 86400.0


def said(run: str, sequence: int, age_s: float) -> Record:
    return Record("INGRESS", sequence, subjects.ingress(run, MINER, "reveal"), b"x", int(1000 * (NOW - age_s)))


def created(run: str, sequence: int) -> Record:
    return Record("RUNS", sequence, subjects.fact(run, "run", 0, "created"), b"y", 5)


class Broker:
    """A log, and what was dropped of it."""

    def __init__(self, *records: Record) -> None:
        self.records, self.js = records, self
        self.purged: list[tuple[str, str]] = []

    async def stored(self, names: Sequence[str], run: str = "") -> AsyncIterator[Record]:
        for record in self.records:
            if record.stream in names:
                yield record

    async def time(self) -> float:
        return NOW

    async def purge_stream(self, name: str, *, subject: str) -> None:
        self.purged.append((name, subject))


LOG = (
    said("real", 1, 9 * DAY), created("real", 1), said("made-up", 2, 9 * DAY), said("busy", 3, 9 * DAY), said("busy", 4, 60),
    said("later", 5, 3 * DAY), created("later", 2),
)  # fmt: skip


async def test_a_stray_run_was_never_created_and_is_quiet() -> None:
    assert await cleaning.stray_runs(cast(Bus, Broker(*LOG)), DAY) == ["made-up"]
    assert await cleaning.stray_runs(cast(Bus, Broker(*LOG)), 0) == ["busy", "made-up"]


@pytest.mark.parametrize("remove", [False, True])
async def test_only_what_was_said_of_it_is_dropped_and_only_when_asked(remove: bool) -> None:
    broker = Broker(*LOG)

    class Empty:
        async def objects(self) -> list[Any]:
            return []

    done = await cleaning.collect(cast(Bus, broker), cast(Any, Empty()), Roster({}), remove=remove)
    assert done.strays == ["made-up"]
    wanted = [("INGRESS", streams.STREAMS["INGRESS"].filter("made-up"))] if remove else []
    assert broker.purged == wanted


async def test_what_a_fact_in_parts_names_is_kept() -> None:
    """A selection of many layers does not fit one message, and it alone names the state that a run begins with."""
    coordinator, selector, state = Identity.generate(), Identity.generate(), "a" * 64
    roster = Roster({"coordinator": frozenset({coordinator.public}), "selector": frozenset({selector.public})})
    layers = [run_pb2.LayerSelection(layer=number, experts=range(64)) for number in range(1500)]
    begun = run_pb2.RunCreated(spec=run_pb2.RunSpec(run="r"))
    selection = run_pb2.SelectionMade(run="r", initial_state=ArtifactRef(digest=state, size=1), layers=layers)
    place = subjects.fact("r", "run", 0, "selected")
    named, head = split(place, seal(selector, place, selection))
    assert named, "it is in parts"
    first = subjects.fact("r", "run", 0, "created")
    written = [(first, seal(coordinator, first, begun))]
    written += [(subject, seal(selector, subject, one)) for subject, one in named]
    written += [(place, head)]
    log = [Record("RUNS", n, subject, one.SerializeToString(), 5) for n, (subject, one) in enumerate(written, 1)]

    class Store:
        async def objects(self) -> list[StoredObject]:
            return [StoredObject(f"public/sha256/{digest}", digest, 1, 9 * DAY, "") for digest in (state, "b" * 64)]

        async def media_type(self, key: str) -> str:
            return ""

        async def get_bytes(self, ref: ArtifactRef) -> bytes:
            return b"x"

    done = await cleaning.collect(cast(Bus, Broker(*log)), cast(Any, Store()), roster)
    assert [one.digest for one in done.stale] == ["b" * 64]
