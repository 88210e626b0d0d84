"""Seconds and memory until a service is ready, by the age of the run that it follows: with what it kept, and without.

A broker of its own holds a signed log of as many cycles with so many miners and three validators; each service is started as
in any installation and asked whether it is ready. `first` reads the whole log, `again` begins with what the first has kept.
The log is laid down by a broker that syncs nothing, and read from one that is set as in any installation. Seconds are those
of the clock and of the processor; memory is the service's when it is ready, and the most that it had until then. Each row is
kept as soon as it is known: `--only 100x200`, miners and cycles, measures one age, goes on where a call before it ended, and
the document has all that were.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from connito.bus import Bus, streams
from connito.errors import Retry
from connito.files import write_durably
from connito.platform.servers import NatsServer
from connito.protocol.findings import PROTOCOL_VERSION
from connito.v1 import cycle_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire import subjects
from connito.wire.checkpoint import Checkpoint
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.verification import ENROL_SUBJECT
from google.protobuf.message import Message

from bench.harness import Options, Result, main, note

RUN = "aged"
SERVICES = ("coordinator", "committer", "validator", "trainer")
# Of so many starts with what is kept, the middle one.
AGAIN = 3
# Miners and cycles.
AGES = ((20, 0), (20, 40), (20, 200), (20, 1000), (100, 40), (100, 200), (100, 1000))
FAR = 4102444800000
# Of a cycle; the committer signs up to one a second.
RECEIPTS = 30
Said = tuple[Identity, str, Message]


class Cast:
    """Holds everybody who has written in the log, and their files."""

    def __init__(self, folder: Path, miners: int) -> None:
        self.folder = folder
        names = ("coordinator", "selector", "committer", "aggregator", "library")
        self.services = {name: Identity.generate() for name in names}
        self.validators = [Identity.generate() for _ in range(3)]
        self.miners = [Identity.generate() for _ in range(miners)]
        members = {name: frozenset({one.public}) for name, one in self.services.items()}
        roster = Roster(members | {"validator": frozenset(one.public for one in self.validators)})
        roster.save(folder / "roster.json")
        own = {**self.services, "validator": self.validators[0], "trainer": self.miners[0]}
        for name in SERVICES:
            own[name].save(folder / f"{name}.nk")

    def say(self, section: str, cycle: int, kind: str, message: Message, who: Identity, id_: str = "") -> Said:
        return who, subjects.fact(RUN, section, cycle, kind, id_), message


def beginning(cast: Cast, cycles: int) -> Iterator[Said]:
    """Yield a run's creation, selection and participants."""
    coordinator = cast.services["coordinator"]
    spec = run_pb2.RunSpec(
        run=RUN, domain="recipes", cycles=cycles + 1, protocol_version=PROTOCOL_VERSION, emission=100
    )
    yield cast.say("run", 0, "created", run_pb2.RunCreated(spec=spec), coordinator)
    selected = run_pb2.SelectionMade(run=RUN, initial_state=ArtifactRef(digest=f"{0:064x}", size=10))
    yield cast.say("run", 0, "selected", selected, cast.services["selector"])
    for miner in cast.miners:
        order = seal(miner, ENROL_SUBJECT, services_pb2.EnrolMinerCommand(run=RUN))
        enrolled = run_pb2.MinerEnrolled(run=RUN, miner=miner.public, order=order)
        yield cast.say("run", 0, "miner", enrolled, coordinator, miner.public)
    for one in cast.validators:
        joined = run_pb2.ValidatorJoined(run=RUN, validator=one.public)
        yield cast.say("run", 0, "validator", joined, one, one.public)
        counted = run_pb2.StakeCounted(run=RUN, validator=one.public, stake=1.0)
        yield cast.say("run", 0, "stake", counted, coordinator, one.public)


def window(cast: Cast, cycle: int, name: str, expected: list[str], stream: str = "INGRESS") -> tuple[Said, Said]:
    """Return the opening and the close of a window."""
    state, value = ArtifactRef(digest=f"{cycle:064x}", size=10), subjects.window_value(name)
    opened = cycle_pb2.WindowOpened(
        run=RUN, cycle=cycle, window=value, expected=expected, deadline_unix_ms=FAR, state=state
    )
    closed = cycle_pb2.WindowClosed(
        run=RUN, cycle=cycle, window=value, stream=stream, last_sequence=3 * len(cast.miners) * cycle
    )
    coordinator = cast.services["coordinator"]
    return (
        cast.say(name, cycle, "opened", opened, coordinator),
        cast.say(name, cycle, "closed", closed, coordinator),
    )


def taking_in(cast: Cast, cycle: int) -> Iterator[Said]:
    """Yield what a cycle writes until its submissions are settled."""
    committer, miners = cast.services["committer"], [one.public for one in cast.miners]
    train, commit, submit = (window(cast, cycle, name, miners) for name in ("train", "commit", "submit"))
    yield train[0]
    for miner in cast.miners:
        said = cycle_pb2.TrainingFinished(run=RUN, cycle=cycle)
        yield miner, subjects.ingress(RUN, miner.public, "trained"), said
    yield from (train[1], commit[0])
    for place, miner in enumerate(cast.miners):
        digest = os.urandom(32)
        message = cycle_pb2.Commitment(run=RUN, cycle=cycle, digest=digest)
        yield miner, subjects.ingress(RUN, miner.public, "commitment"), message
        accepted = cycle_pb2.CommitmentAccepted(
            run=RUN, cycle=cycle, miner=miner.public, digest=digest, ingress_sequence=place + 1
        )
        yield cast.say("commit", cycle, "accepted", accepted, committer, miner.public)
    yield commit[1]
    settled = cycle_pb2.WindowSettled(run=RUN, cycle=cycle, window=cycle_pb2.WINDOW_COMMIT, committed=sorted(miners))
    yield from (cast.say("commit", cycle, "settled", settled, committer), submit[0])
    entries = []
    for place, miner in enumerate(cast.miners):
        work = ArtifactRef(digest=os.urandom(32).hex(), size=10)
        reveal = cycle_pb2.Reveal(run=RUN, cycle=cycle, artifact=work, salt=bytes(16))
        yield miner, subjects.ingress(RUN, miner.public, "reveal"), reveal
        entry = cycle_pb2.Submission(miner=miner.public, artifact=work, origin_cycle=cycle, reveal_sequence=place + 1)
        entries.append(entry)
        taken = cycle_pb2.RevealAccepted(run=RUN, cycle=cycle, submission=entry)
        yield cast.say("submit", cycle, "accepted", taken, committer, miner.public)
    done = cycle_pb2.WindowSettled(run=RUN, cycle=cycle, window=cycle_pb2.WINDOW_SUBMIT, submissions=entries)
    yield from (submit[1], cast.say("submit", cycle, "settled", done, committer))


def judging(cast: Cast, cycle: int) -> Iterator[Said]:
    """Yield what a cycle writes from then on."""
    aggregator, miners = cast.services["aggregator"], [one.public for one in cast.miners]
    validate = window(cast, cycle, "validate", [one.public for one in cast.validators], "VALIDATE")
    merge = window(cast, cycle, "merge", [], "MERGE")
    yield validate[0]
    for one in cast.validators:
        losses = [
            cycle_pb2.SequenceLoss(domain="recipes", sequence=n, before=1.0, after=0.9, tokens=64) for n in range(8)
        ]
        scores = [cycle_pb2.SubmissionScore(miner=miner, utility=0.1, losses=losses) for miner in miners]
        report = cycle_pb2.ScoreReport(run=RUN, cycle=cycle, validator=one.public, scores=scores)
        yield cast.say("validate", cycle, "report", report, one, one.public)
    yield from (validate[1], merge[0])
    verdicts = [cycle_pb2.Verdict(miner=miner, rank=1, reward=5, utility=0.1) for miner in miners]
    scored = cycle_pb2.CycleScored(run=RUN, cycle=cycle, verdicts=verdicts)
    yield cast.say("merge", cycle, "scored", scored, aggregator)
    state = ArtifactRef(digest=f"{cycle:064x}", size=10)
    version = cycle_pb2.VersionPublished(run=RUN, cycle=cycle, version=cycle, state=state)
    yield cast.say("merge", cycle, "version", version, aggregator)
    yield merge[1]


def receipts(cast: Cast, cycle: int) -> Iterator[Said]:
    """Yield the receipts of a cycle."""
    committer = cast.services["committer"]
    for number in range(RECEIPTS * (cycle - 1) + 1, RECEIPTS * cycle + 1):
        heard = Checkpoint("connito/aged", number, bytes(32)).signed(committer).note
        message = run_pb2.IngressHead(run=RUN, cycle=number, checkpoint=heard, last_sequence=number)
        yield cast.say("run", number, "received", message, committer)


def story(cast: Cast, cycles: int) -> Iterator[Said]:
    """Yield a run of as many cycles, whose next one has begun."""
    yield from beginning(cast, cycles)
    for cycle in range(1, cycles + 1):
        yield from taking_in(cast, cycle)
        yield from judging(cast, cycle)
        yield from receipts(cast, cycle)
    yield window(cast, cycles + 1, "train", [one.public for one in cast.miners])[0]


async def fill(url: str, cast: Cast, cycles: int) -> int:
    """Write the log into the broker; return its messages."""
    sent = 0
    async with await Bus.connect(url, None, "fill") as bus:
        await streams.ensure(bus.js)
        for who, subject, message in story(cast, cycles):
            await bus.js._nc.publish(subject, seal(who, subject, message).SerializeToString())
            sent += 1
            if sent % 250 == 0:
                await settle(bus, sent)
        await settle(bus, sent)
    return sent


class Unsynced(NatsServer):
    """The broker of an installation, but for its syncs: a log is laid down ten times as fast."""

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        return config | {"jetstream": config["jetstream"] | {"sync_interval": "10m"}}


async def settle(bus: Bus, messages: int) -> None:
    """Wait until the broker has so many messages: of what comes faster than it stores, it refuses some."""
    await bus.js._nc.flush()
    async with asyncio.timeout(300):
        stored = 0
        while stored < messages:
            await asyncio.sleep(0.01)
            with suppress(Retry):  # A busy machine's broker answers late.
                stored = sum([await bus.last_sequence(name) for name in (*streams.FACT_STREAMS, "INGRESS")])


def start(service: str, cast: Cast, url: str, state: Path | None) -> dict[str, Any]:
    """Start a service; return seconds and bytes in memory when it is ready, and end it."""
    ports = cast.folder / "ports.json"
    ports.unlink(missing_ok=True)
    settings = {
        "nats_url": url, "key_file": str(cast.folder / f"{service}.nk"), "roster": str(cast.folder / "roster.json"),
        "s3_access_key": "a", "s3_secret_key": "b", "port_file": str(ports), "cache_dir": str(cast.folder / "cache"),
        "work_dir": str(cast.folder / "work"), "state_dir": "" if state is None else str(state),
    }  # fmt: skip
    given = {f"CONNITO_{name.upper()}": value for name, value in settings.items() if value}
    began = time.monotonic()
    with (cast.folder / f"{service}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{service}"], env={**os.environ, **given}, stdout=log, stderr=log
        )
    try:
        while not _is_ready(ports):
            if process.poll() is not None:
                raise RuntimeError((cast.folder / f"{service}.log").read_text()[-2000:])
            time.sleep(0.02)
        seconds, spent = time.monotonic() - began, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
        cpu = sum(map(int, spent.split()[11:13])) / os.sysconf("SC_CLK_TCK")
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = dict(line.split()[:2] for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM")))
        rss, peak = (round(int(memory[name]) / 1024, 1) for name in ("VmRSS:", "VmHWM:"))
        return {"seconds": round(seconds, 2), "cpu_s": round(cpu, 2), "rss_mb": rss, "peak_mb": peak}
    finally:
        process.terminate()
        process.wait()


def _is_ready(ports: Path) -> bool:
    with suppress(OSError, ValueError, KeyError):
        port = json.loads(ports.read_text())["http"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    return False


def measured(miners: int, cycles: int, kept_in: Path) -> None:
    """Start each service on a log of one age: once without what it keeps, and often with; keep a row for each."""
    missing = [service for service in SERVICES if not _row(kept_in, miners, cycles, service).exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        cast, broker = Cast(Path(folder), miners), Path(folder) / "nats"
        with Unsynced(broker) as server:
            messages = asyncio.run(fill(server.url, cast, cycles))
        note(f"{cycles} cycles of {miners} miners: {messages} messages")
        with NatsServer(broker) as server:
            for service in missing:
                state = Path(folder) / "state"
                first, *again = (start(service, cast, server.url, state) for _ in range(1 + AGAIN))
                kept = sum(path.stat().st_size for path in state.glob(f"log-{service}-*"))
                row = {"miners": miners, "cycles": cycles, "messages": messages, "service": service, "first": first}
                middle = sorted(again, key=lambda one: float(one["seconds"]))[AGAIN // 2]
                row |= {"again": middle, "agains": again, "kept_mb": round(kept / 1e6, 1)}
                write_durably(_row(kept_in, miners, cycles, service), json.dumps(row))
                note(str(row))


def _row(folder: Path, miners: int, cycles: int, service: str) -> Path:
    return folder / f"{miners}x{cycles}-{service}.json"


def run(options: Options) -> Result:
    """Measure each age that is not kept from an earlier call; return what all of them showed."""
    folder = options.out / "starting-ages"
    folder.mkdir(parents=True, exist_ok=True)
    for miners, cycles in AGES[:2] if options.quick else AGES:
        if options.only in ("", f"{miners}x{cycles}"):
            measured(miners, cycles, folder)
    rows = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    rows.sort(key=lambda row: (row["service"], row["miners"], row["cycles"]))
    figures = {
        f"{row['service']}, {row['miners']} miners, {row['cycles']} cycles": f"first {row['first']['seconds']} s, "
        f"{row['first']['rss_mb']} MB; again {row['again']['seconds']} s, {row['again']['rss_mb']} MB"
        for row in rows
    }
    return Result({"validators": 3}, rows, figures)


if __name__ == "__main__":
    main("starting", run, doc=__doc__ or "")
