"""Measure what a cycle costs the control plane, by miners: real broker, store, coordinator and committer, and played people.

Miners, one validator, selector and aggregator are played without a model by this process, whose own time does not count: miners
sign, commit, ask for an upload address, upload a small state and reveal; the validator draws and scores, the aggregator
publishes.
Each process of the control plane is charged its CPU seconds from one opened cycle to the next, the broker also its messages and
bytes. Miners share one connection to the broker, so what thousands of connections cost it is not in the figures. Exponents
are slopes of log seconds over log miners between neighbouring sizes, of the mean of the cycles behind the first.

    python -m bench.control_plane --miners 4,64,1000 --cycles 3
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import math
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from connito.bus import Bus, CaughtUp, streams
from connito.errors import Retry
from connito.platform.servers import NatsServer, ObjectStore, free_ports
from connito.protocol.beacon import secret_digest
from connito.protocol.commitment import commitment_digest
from connito.protocol.findings import PROTOCOL_VERSION
from connito.runtime.tasks import end_tasks
from connito.service import rpc
from connito.store import ArtifactStore, put_presigned
from connito.v1 import cycle_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef
from connito.v1.services_pb2_grpc import RunServiceStub, SubmissionServiceStub
from connito.wire.envelope import seal
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import ROLES, Roster
from connito.wire.subjects import fact, ingress
from google.protobuf.message import Message
from safetensors.numpy import save

from bench.harness import machine, note
from tests.integration.witness import ServiceProcess

SALT, SECRET, RUN = b"s" * 32, b"b" * 32, "bench"
STATE = np.linspace(-1, 1, 2048, dtype=np.float32).reshape(2, 32, 32)
AT_ONCE = 32
MINERS_READ = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "MERGE")
WINDOWS = ("train", "commit", "submit", "validate", "merge")
# Facts one by one, of which players need none.
OF_ONE_MINER = (".accepted.", ".refused.", ".run.0.miner.", ".ingress.")


class Broker(NatsServer):
    """The broker, counting."""

    def _config(self) -> dict[str, Any]:
        self.monitor = free_ports(1)[0]
        return {**super()._config(), "http": f"127.0.0.1:{self.monitor}"}

    def counted(self) -> dict[str, int]:
        """Return messages and bytes that came in and went out so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}/varz") as answer:
            told = json.load(answer)
        return {name: int(told[name]) for name in ("in_msgs", "out_msgs", "in_bytes", "out_bytes")}


def submission(cycle: int, number: int) -> bytes:
    """Return a small state of its own for each miner and cycle."""
    moved = STATE.copy()
    moved[0, 0, :2] += np.float32(1e-3) * np.array([cycle, number + 1], np.float32)
    data: bytes = save({"layers.0.down_proj": moved})
    return data


def ref_of(data: bytes) -> ArtifactRef:
    """Return what a miner reveals."""
    return ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=len(data), realm=REALM_SUBMISSION)


async def each(items: Iterable[Any], work: Callable[[Any], Awaitable[object]]) -> None:
    """Do something for every item, a few at once."""
    waiting = iter(items)

    async def one() -> None:
        for item in waiting:
            await work(item)

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


@dataclass
class Players:
    """The people of a run: everybody who is no service here."""

    buses: dict[str, Bus]
    miners: list[Identity]
    theta: ArtifactRef
    folder: Path
    roster: Roster
    facts: RunFacts = field(default_factory=lambda: RunFacts(RUN))
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    # What stands in the streams that a miner reads from, and what of it one miner reads: messages and bytes.
    stands: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)

    async def read(self) -> None:
        """Follow what is said of everybody at once."""
        log = Log(self.roster)
        async for item in self.buses["coordinator"].follow(
            ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE"), RUN
        ):
            if not isinstance(item, CaughtUp) and item.stream in MINERS_READ:
                self.stands.update(messages=1, bytes=len(item.data))
            if not isinstance(item, CaughtUp) and not any(part in item.subject for part in OF_ONE_MINER):
                log.apply(item)
                self.facts = log.runs.get(RUN, self.facts)
            self.moved.set()

    async def read_along(self) -> None:
        """Follow as one miner does (`services.trainer.own`); its own answers are counted with the cycle."""
        async for item in self.buses["validator"].follow(MINERS_READ, RUN, of_all=True):
            if not isinstance(item, CaughtUp):
                self.reads.update(messages=1, bytes=len(item.data))

    async def answers(self, cycle: int) -> None:
        """Look up what the committer said to the first miner."""
        for window in ("commit", "submit"):
            place = fact(RUN, window, cycle, "accepted", self.miners[0].public)
            found = await self.buses["validator"].look(window.upper(), last_by_subj=place)
            assert found is not None
            self.reads.update(messages=1, bytes=len(found.data))

    async def until(self, satisfied: Callable[[RunFacts], object]) -> float:
        """Wait for facts; return the time at which they were there."""
        while not satisfied(self.facts):
            self.moved.clear()
            await self.moved.wait()
        return time.monotonic()

    async def say(self, miner: Identity, kind: str, message: Message) -> None:
        """Say something as a miner."""
        subject = ingress(RUN, miner.public, kind)
        data = seal(miner, subject, message).SerializeToString()
        name = {"Nats-Msg-Id": hashlib.sha256(data).hexdigest()}

        async def publish() -> None:
            try:
                await self.buses["selector"].js.publish(subject, data, timeout=60, headers=name)
            except TimeoutError as error:
                raise Retry("the broker is busy") from error

        await _patiently(publish)

    async def fact(self, role: str, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> None:
        """Write a fact in a role."""
        await self.buses[role].publish_fact(RUN, section, cycle, kind, message, id_)

    async def begin(self) -> None:
        """Create the run, select, enrol everybody."""
        spec = run_pb2.RunSpec(
            run=RUN, cycles=1000, protocol_version=PROTOCOL_VERSION, emission=1_000_000,
            scoring=run_pb2.ScorePolicy(max_relative_norm=0.5, paid_ranks=10),
            enrolment=run_pb2.EnrolmentPolicy(mode="open", messages_per_cycle=4),
            windows=run_pb2.WindowPolicy(min_miners=len(self.miners), min_validators=1, floor_seconds=3600,
                                         ceiling_seconds=7200, assemble_seconds=7200),
        )  # fmt: skip
        await self.fact("coordinator", "run", 0, "created", run_pb2.RunCreated(spec=spec))
        api = RunServiceStub(rpc.channel(await self.buses["selector"].find_endpoint("coordinator")))

        async def enrol(miner: Identity) -> None:
            command = services_pb2.EnrolMinerCommand(run=RUN)
            request = services_pb2.EnrolMinerRequest(envelope=seal(miner, "rpc.EnrolMiner", command))
            await _patiently(lambda: rpc.call(api.EnrolMiner, request, 60))

        await each(self.miners, enrol)
        validator = self.buses["validator"].identity.public
        joined = run_pb2.ValidatorJoined(run=RUN, validator=validator)
        await self.fact("validator", "run", 0, "validator", joined, validator)
        await self.fact("selector", "run", 0, "selected", run_pb2.SelectionMade(run=RUN, initial_state=self.theta))

    async def cycle(self, cycle: int) -> dict[str, float]:
        """Play one cycle; return the seconds of each window."""
        times, key = {}, self.buses["validator"].identity.public
        began = await self.until(lambda facts: facts.window("train", cycle).opened)
        work = {miner.public: submission(cycle, number) for number, miner in enumerate(self.miners)}
        await self._validator("train", cycle, "seed", cycle_pb2.SeedCommitted(
            run=RUN, cycle=cycle, validator=key, digest=secret_digest(RUN, cycle, key, SECRET)))  # fmt: skip
        trained = cycle_pb2.TrainingFinished(run=RUN, cycle=cycle, steps=1, tokens=1)
        await each(self.miners, lambda miner: self.say(miner, "trained", trained))
        for name, act in (("commit", self._commit), ("submit", self._submit)):
            opened = await self.until(lambda facts, name=name: facts.window(name, cycle).opened)  # type: ignore[misc]
            times["train" if name == "commit" else "commit"] = opened - began
            began = opened
            await act(cycle, work)
        opened = await self.until(lambda facts: facts.window("validate", cycle).opened)
        times["submit"], began = opened - began, opened
        await self._validator(
            "validate", cycle, "seed", cycle_pb2.SeedRevealed(run=RUN, cycle=cycle, validator=key, secret=SECRET)
        )
        await self.until(lambda facts: facts.drawn(cycle))
        scores = [cycle_pb2.SubmissionScore(miner=miner.public, utility=0.1) for miner in self.miners]
        seed = self.facts.require_drawn(cycle).seed
        report = cycle_pb2.ScoreReport(run=RUN, cycle=cycle, validator=key, seed=seed, scores=scores)
        await self._validator("validate", cycle, "report", report)
        opened = await self.until(lambda facts: facts.window("merge", cycle).opened)
        times["validate"], began = opened - began, opened
        await self._merge(cycle)
        times["merge"] = await self.until(lambda facts: facts.window("train", cycle + 1).opened) - began
        return times

    async def _validator(self, section: str, cycle: int, kind: str, message: Message) -> None:
        await self.fact("validator", section, cycle, kind, message, self.buses["validator"].identity.public)

    async def _commit(self, cycle: int, work: dict[str, bytes]) -> None:
        async def commit(miner: Identity) -> None:
            artifact = ref_of(work[miner.public]).digest
            digest = commitment_digest(RUN, cycle, miner.public, self.theta.digest, artifact, SALT)
            await self.say(miner, "commitment", cycle_pb2.Commitment(run=RUN, cycle=cycle, digest=digest))

        await each(self.miners, commit)

    async def _submit(self, cycle: int, work: dict[str, bytes]) -> None:
        api = SubmissionServiceStub(rpc.channel(await self.buses["selector"].find_endpoint("committer")))

        async def reveal(miner: Identity) -> None:
            data = work[miner.public]
            said: dict[str, Any] = {
                "run": RUN,
                "cycle": cycle,
                "artifact": ref_of(data),
                "base_state_digest": self.theta.digest,
            }
            request = services_pb2.RequestUploadRequest(
                envelope=seal(miner, "rpc.RequestUpload", services_pb2.UploadCommand(**said, salt=SALT))
            )
            slot = await _patiently(lambda: rpc.call(api.RequestUpload, request, 60))
            path = self.folder / miner.public
            path.write_bytes(data)
            await _patiently(lambda: put_presigned(slot.url, slot.headers, path))
            await self.say(miner, "reveal", cycle_pb2.Reveal(**said, salt=SALT))

        await each(self.miners, reveal)

    async def _merge(self, cycle: int) -> None:
        keys = [miner.public for miner in self.miners]
        status = cycle_pb2.VERDICT_STATUS_SCORED
        verdicts = [cycle_pb2.Verdict(miner=key, status=status, utility=0.1, rank=n + 1) for n, key in enumerate(keys)]
        standings = [cycle_pb2.MinerStanding(miner=key, judged=cycle, useful=cycle) for key in sorted(keys)]
        scored = cycle_pb2.CycleScored(run=RUN, cycle=cycle, verdicts=verdicts, miners=standings)
        await self.fact("aggregator", "merge", cycle, "scored", scored)
        version = cycle_pb2.VersionPublished(run=RUN, cycle=cycle, version=cycle, parent=cycle - 1, state=self.theta)
        await self.fact("aggregator", "merge", cycle, "version", version)


async def _patiently(ask: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        try:
            return await ask()
        except Retry as error:
            await asyncio.sleep(error.after)


def _spent(pids: dict[str, int]) -> dict[str, float]:
    times = {name: psutil.Process(pid).cpu_times() for name, pid in pids.items()}
    return {name: one.user + one.system for name, one in times.items()}


async def measured(miners: int, cycles: int, folder: Path) -> list[dict[str, Any]]:
    """Play a run of so many miners; return a row for each cycle."""
    identities = {role: Identity.generate() for role in ROLES}
    roster = Roster({role: frozenset({identities[role].public}) for role in ROLES})
    async with AsyncExitStack() as stack:
        broker = stack.enter_context(Broker(folder / "nats"))
        weed = stack.enter_context(ObjectStore(folder / "weed"))
        async with await Bus.connect(broker.url, None, "declare") as bus:
            await streams.ensure(bus.js)
        store = ArtifactStore(weed.url, weed.access_key, weed.secret_key, "bench", "us-east-1", folder / "cache")
        await store.ensure_bucket()
        theta = await store.put_bytes(save({"layers.0.down_proj": STATE}), "application/octet-stream", REALM_PUBLIC)
        env = {
            "CONNITO_NATS_URL": broker.url, "CONNITO_S3_ENDPOINT": weed.url, "CONNITO_S3_ACCESS_KEY": weed.access_key,
            "CONNITO_S3_SECRET_KEY": weed.secret_key, "CONNITO_S3_BUCKET": store.bucket,
        }  # fmt: skip
        pids = {"broker": broker.pid, "store": weed.pid}
        for name in ("coordinator", "committer"):
            service = ServiceProcess(name, folder / name, identities[name], roster, env).start()
            stack.callback(service.kill)
            assert service.process is not None
            pids[name] = service.process.pid
            await service.ready()
        buses = {
            role: await stack.enter_async_context(await Bus.connect(broker.url, identities[role], role, roster))
            for role in ("coordinator", "selector", "validator", "aggregator")
        }
        players = Players(buses, [Identity.generate() for _ in range(miners)], theta, folder, roster)
        reading = [asyncio.create_task(work) for work in (players.read(), players.read_along())]
        try:
            return await _rows(players, broker, pids, cycles)
        finally:
            await end_tasks(reading)


async def _rows(players: Players, broker: Broker, pids: dict[str, int], cycles: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    before = _spent(pids)
    await players.begin()
    await players.until(lambda facts: facts.window("train", 1).opened)
    enrolling = _spent(pids)
    note(f"{len(players.miners)} miners: enrolled for {sum(enrolling.values()) - sum(before.values()):.1f} CPU s")
    for cycle in range(1, cycles + 1):
        spent, counted, read = _spent(pids), broker.counted(), (players.stands.copy(), players.reads.copy())
        windows = await players.cycle(cycle)
        now, then = _spent(pids), broker.counted()
        row: dict[str, Any] = {"miners": len(players.miners), "cycle": cycle}
        row |= {f"{name}_cpu_s": round(now[name] - spent[name], 3) for name in pids}
        row["cpu_s"] = round(sum(now.values()) - sum(spent.values()), 3)
        row |= {name: then[name] - counted[name] for name in counted}
        await players.answers(cycle)
        for name, now_read, was in zip(("stands", "miner_reads"), (players.stands, players.reads), read, strict=True):
            row |= {f"{name}_{what}": now_read[what] - was[what] for what in ("messages", "bytes")}
        row |= {f"{name}_seconds": round(windows[name], 2) for name in WINDOWS}
        row |= {f"{name}_rss_mb": round(psutil.Process(pid).memory_info().rss / 1e6) for name, pid in pids.items()}
        note(str(row))
        rows.append(row)
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means by number of miners, of the cycles behind the first where there are any, and slopes between neighbours."""
    sizes = sorted({row["miners"] for row in rows})
    means: dict[int, dict[str, float]] = {}
    for size in sizes:
        mine = [row for row in rows if row["miners"] == size]
        counted = [row for row in mine if row["cycle"] > 1] or mine
        means[size] = {name: sum(row[name] for row in counted) / len(counted) for name in counted[0]}
    found: dict[str, Any] = {f"cpu_s_{size}_miners": round(mean["cpu_s"], 2) for size, mean in means.items()}
    for one, two in itertools.pairwise(sizes):
        for name in ("cpu_s", "coordinator_cpu_s", "committer_cpu_s", "broker_cpu_s", "in_msgs", "out_bytes"):
            slope = math.log(max(means[two][name], 1e-3) / max(means[one][name], 1e-3)) / math.log(two / one)
            found[f"exponent_{name}_{one}_{two}"] = round(slope, 2)
    return found


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miners", default="4,16,64,256,1000", help="numbers of miners (default %(default)s)")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--note", default="", help="what else this machine did meanwhile, for the page")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "control_plane.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for miners in map(int, asked.miners.split(",")):
        with tempfile.TemporaryDirectory(prefix="connito-bench-") as folder:
            fresh = asyncio.run(measured(miners, asked.cycles, Path(folder)))
        rows = [row for row in rows if row["miners"] != miners] + fresh
        document = {
            "name": "control_plane",
            "machine": machine(),
            "settings": {"note": asked.note},
            "rows": rows,
            "figures": figures(rows),
        }
        path.write_text(json.dumps(document, indent=2) + "\n")
    for name, value in figures(rows).items():
        print(f"  {name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
