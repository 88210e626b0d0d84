"""The facts of one run, written down by hand, for the committer's judgements."""

from __future__ import annotations

from dataclasses import dataclass, field

from connito.bus.streams import stream_of
from connito.protocol.bans import banned
from connito.protocol.commitment import commitment_digest
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import FactKey, fact, ingress
from google.protobuf.message import Message

RUN = "r1"
SIZE = 100_000
SALT = b"s" * 32


def theta(cycle: int) -> ArtifactRef:
    """The state that a cycle starts from."""
    return ArtifactRef(digest=f"{cycle:064x}", size=SIZE, realm=REALM_PUBLIC)


def artifact(miner: str, cycle: int, size: int = SIZE) -> ArtifactRef:
    """What `miner` made in `cycle`."""
    digest = (miner.encode().hex() + f"{cycle:04x}").ljust(64, "f")
    return ArtifactRef(digest=digest, size=size, realm=REALM_SUBMISSION)


def opening(miner: str, cycle: int, made: ArtifactRef | None = None, base: ArtifactRef | None = None) -> bytes:
    """The digest that commits to it."""
    base = base or theta(cycle)
    return commitment_digest(RUN, cycle, miner, base.digest, (made or artifact(miner, cycle)).digest, SALT)


@dataclass
class Ledger:
    """A run whose windows are opened and closed by hand. INGRESS sequences are counted as the broker would."""

    cycles: int = 3
    facts: RunFacts = field(default_factory=lambda: RunFacts(RUN))
    reveals: dict[int, Fact] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.publish("run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run=RUN, cycles=self.cycles)))
        self.publish("run", 0, "selected", run_pb2.SelectionMade(run=RUN, initial_state=theta(1)))

    def publish(self, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> bool:
        return self._store(
            stream_of(fact(RUN, section, cycle, kind, id_)), FactKey(section, cycle, kind, id_), message, "service"
        )[1]

    def _store(self, stream: str, key: FactKey, message: Message, signer: str) -> tuple[Fact, bool]:
        sequence = self.sequences[stream] = self.sequences.get(stream, 0) + 1
        stored = Fact(RUN, key, message, signer, stream, sequence, 1000 * sequence)
        return stored, self.facts.add(stored)

    def enrol(self, *miners: str) -> None:
        for miner in miners:
            self.publish("run", 0, "miner", run_pb2.MinerEnrolled(run=RUN, miner=miner), miner)

    def ban(self, miner: str, number: int = 1, *, lifted: bool = False) -> None:
        message = run_pb2.MinerBan(run=RUN, miner=miner, number=number, why="floods", lifted=lifted)
        self.publish("run", 0, "ban", message, f"{miner}-{number}")

    def open(self, window: str, cycle: int) -> None:
        message = cycle_pb2.WindowOpened(run=RUN, cycle=cycle, state=theta(cycle))
        self.publish(window, cycle, "opened", message)

    def close(self, window: str, cycle: int) -> None:
        last = self.sequences.get("INGRESS", 0)
        message = cycle_pb2.WindowClosed(run=RUN, cycle=cycle, stream="INGRESS", last_sequence=last)
        message.runs_sequence = self.sequences["RUNS"]
        message.banned.extend(banned(self.facts))
        self.publish(window, cycle, "closed", message)

    def end(self) -> None:
        self.publish("run", 0, "ended", run_pb2.RunEnded(run=RUN))

    def say(self, miner: str, kind: str, cycle: int, message: Message) -> Fact:
        stream = stream_of(ingress(RUN, miner, kind))
        return self._store(stream, FactKey("ingress", cycle, kind, miner), message, miner)[0]

    def commitment(self, miner: str, cycle: int, digest: bytes | None = None) -> Fact:
        chosen = opening(miner, cycle) if digest is None else digest
        return self.say(miner, "commitment", cycle, cycle_pb2.Commitment(run=RUN, cycle=cycle, digest=chosen))

    def reveal(
        self,
        miner: str,
        cycle: int,
        made: ArtifactRef | None = None,
        base: ArtifactRef | None = None,
        salt: bytes = SALT,
    ) -> Fact:
        message = cycle_pb2.Reveal(
            run=RUN,
            cycle=cycle,
            artifact=made or artifact(miner, cycle),
            base_state_digest=(base or theta(cycle)).digest,
            salt=salt,
        )
        said = self.say(miner, "reveal", cycle, message)
        self.reveals[said.sequence] = said
        return said
