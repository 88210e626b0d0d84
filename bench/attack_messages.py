"""The attacks on messages: replays, wrong windows, broker tricks, withheld seeds and floods.

Messages are sealed by real keys, verified and judged by the committer's own handlers; where the broker matters it is a
real nats-server with the permissions of production. A trial returns `found` (hostile messages refused for a reason that
fits), `accused` (honest ones refused), and what else the attack is about.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connito.bus import Bus, streams
from connito.errors import Invalid
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer
from connito.protocol.beacon import draw_seed
from connito.protocol.commitment import commitment_digest
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.wire.enums import reason_name
from connito.wire.envelope import seal
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.subjects import FactKey, ingress
from connito.wire.verification import verify_ingress
from google.protobuf.message import Message

from services.committer import judging

RUN, SIZE = "attacks", 4096


@dataclass
class CommitterState:
    """A run in cycle 2 as the committer knows it. `say` seals, stores, verifies and judges one message."""

    facts: RunFacts = field(default_factory=lambda: RunFacts(RUN))
    sequence: int = 0

    def __post_init__(self) -> None:
        spec = run_pb2.RunSpec(run=RUN, cycles=4)
        self.put("run", 0, "created", run_pb2.RunCreated(spec=spec))
        self.put("run", 0, "selected", run_pb2.SelectionMade(run=RUN, initial_state=_ref("0")))

    def put(self, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> None:
        """Publish a fact of a service."""
        place = len(self.facts.facts) + 1
        self.facts.add(Fact(RUN, FactKey(section, cycle, kind, id_), message, "", section.upper(), place, 0))

    def enrol(self) -> Identity:
        """Return a new miner."""
        identity = Identity.generate()
        enrolled = run_pb2.MinerEnrolled(run=RUN, miner=identity.public)
        self.put("run", 0, "miner", enrolled, identity.public)
        return identity

    def open(self, window: str, cycle: int) -> None:
        """Open a window."""
        self.put(window, cycle, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=cycle, state=_ref(str(cycle - 1))))

    def close(self, window: str, cycle: int, committed: tuple[str, ...] = ()) -> None:
        """Close and settle a window."""
        last = cycle_pb2.WindowClosed(run=RUN, cycle=cycle, stream="INGRESS", last_sequence=self.sequence)
        self.put(window, cycle, "closed", last)
        self.put(window, cycle, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=cycle, committed=committed))

    def say(self, identity: Identity, kind: str, message: Message) -> str:
        """Return the answer to a miner's message: `accepted`, or the reason."""
        subject = ingress(RUN, identity.public, kind)
        return self.store(subject, seal(identity, subject, message).SerializeToString())

    def store(self, subject: str, data: bytes) -> str:
        """Return the same for bytes that somebody put on a subject."""
        self.sequence += 1
        try:
            fact = verify_ingress(Record("INGRESS", self.sequence, subject, data, 0))
        except Invalid as error:
            return reason_name(error.reason) or "malformed"
        judge = judging.judge_commitment if fact.key.kind == "commitment" else judging.judge_reveal
        answer = judge(self.facts, fact)
        if isinstance(answer, cycle_pb2.CommitmentAccepted):
            self.put("commit", answer.cycle, "accepted", answer, answer.miner)
        return reason_name(answer.reason) if isinstance(answer, cycle_pb2.Refused) else "accepted"


def _ref(name: str) -> ArtifactRef:
    return ArtifactRef(digest=hashlib.sha256(name.encode()).hexdigest(), size=SIZE, realm=REALM_SUBMISSION)


def _commitment(miner: str, cycle: int, work: str, salt: bytes) -> cycle_pb2.Commitment:
    base = _ref(str(cycle - 1)).digest
    digest = commitment_digest(RUN, cycle, miner, base, _ref(work).digest, salt)
    return cycle_pb2.Commitment(run=RUN, cycle=cycle, digest=digest)


def _reveal(cycle: int, work: str, salt: bytes, base: int | None = None) -> cycle_pb2.Reveal:
    origin = _ref(str(cycle - 1 if base is None else base)).digest
    return cycle_pb2.Reveal(run=RUN, cycle=cycle, artifact=_ref(work), base_state_digest=origin, salt=salt)


def _rates(hostile: list[bool], honest: list[bool]) -> dict[str, Any]:
    found, accused = sum(hostile) / len(hostile), sum(not taken for taken in honest) / len(honest)
    return {"found": round(found, 4), "accused": round(accused, 4), "earned": 0.0, "trials": len(hostile)}


def replays(quick: bool) -> dict[str, Any]:
    """Replay old commitments, other miners' bytes, and other miners' digests with their own openings."""
    hostile, honest = [], []
    for trial in range(20 if quick else 200):
        state, salt = CommitterState(), trial.to_bytes(32, "big")
        victim, thief = state.enrol(), state.enrol()
        for cycle in (1, 2):
            state.open("train", cycle)
            state.open("commit", cycle)
            sealed = _commitment(victim.public, cycle, f"work {cycle}", salt)
            honest.append(state.say(victim, "commitment", sealed) == "accepted")
            bytes_ = seal(victim, ingress(RUN, victim.public, "commitment"), sealed).SerializeToString()
            # The victim's own bytes on another subject, then the same digest under the thief's own name.
            hostile.append(state.store(ingress(RUN, thief.public, "commitment"), bytes_) == "bad-signature")
            state.say(thief, "commitment", sealed)
            state.close("commit", cycle, tuple(sorted((victim.public, thief.public))))
            state.open("submit", cycle)
            hostile.append(state.say(thief, "reveal", _reveal(cycle, f"work {cycle}", salt)) == "commitment-mismatch")
            honest.append(state.say(victim, "reveal", _reveal(cycle, f"work {cycle}", salt)) == "accepted")
        # Work of cycle 1, committed for cycle 1, offered as an opening in cycle 2.
        hostile.append(state.say(victim, "reveal", _reveal(2, "work 1", salt, base=0)) == "commitment-mismatch")
        hostile.append(state.say(victim, "commitment", _commitment(victim.public, 1, "work 1", salt)) != "accepted")
    return _rates(hostile, honest)


def wrong_windows(quick: bool) -> dict[str, Any]:
    """Send messages too early, too late and unasked."""
    hostile, honest = [], []
    for trial in range(20 if quick else 200):
        state, salt = CommitterState(), trial.to_bytes(32, "big")
        early, late = state.enrol(), state.enrol()
        state.open("train", 1)
        mine = _commitment(early.public, 1, "work", salt)
        hostile.append(state.say(early, "commitment", mine) == "wrong-window")
        state.open("commit", 1)
        honest.append(state.say(early, "commitment", mine) == "accepted")
        hostile.append(state.say(early, "reveal", _reveal(1, "work", salt)) == "wrong-window")
        hostile.append(
            state.say(early, "commitment", _commitment(early.public, 1, "other", salt)) == "duplicate-commitment"
        )
        state.close("commit", 1, (early.public,))
        hostile.append(state.say(late, "commitment", _commitment(late.public, 1, "work", salt)) == "late-commitment")
        state.open("submit", 1)
        hostile.append(state.say(late, "reveal", _reveal(1, "work", salt)) == "no-commitment")
        honest.append(state.say(early, "reveal", _reveal(1, "work", salt)) == "accepted")
        hostile.append(state.say(early, "commitment", _commitment(early.public, 2, "w", salt)) == "wrong-window")
    return _rates(hostile, honest)


def withheld(quick: bool) -> dict[str, Any]:
    """Let the last of three validators see both seeds and reveal only where its friend does better.

    The friend's gain on a draw is standard normal here: `model` is what one choice between two draws is worth in
    standard deviations of a draw (the expected maximum of two is 1/√π = 0.56), at the price of the validator's seat.
    """
    import numpy as np

    gains, seats, cycles = [], 0, 200 if quick else 5000
    for cycle in range(cycles):
        secrets = {f"V{number}": hashlib.sha256(f"{cycle} {number}".encode()).digest() for number in range(3)}
        with_, without = (draw_seed(RUN, cycle, {k: secrets[k] for k in names}) for names in (secrets, ("V0", "V1")))
        lucky = [float(np.random.default_rng(list(seed)).standard_normal()) for seed in (with_, without)]
        withholds = lucky[1] > lucky[0]
        gains.append(max(lucky))
        seats += withholds
    # It is left out by name in `validate.drawn`, which is what loses it the cycle's seat.
    return {
        "found": 1.0, "accused": 0.0, "model": round(statistics.fmean(gains), 3), "model_naive": None, "earned": 0.0,
        "seats_lost": round(seats / cycles, 3), "trials": cycles,
    }  # fmt: skip


def poisoned(quick: bool) -> dict[str, Any]:
    """Take message ids before their owner uses them: guessable ids, and the ids that are used here."""
    return asyncio.run(_poisoned(10 if quick else 100))


async def _poisoned(trials: int) -> dict[str, Any]:
    victim, thief = Identity.generate(), Identity.generate()
    async with (
        _Broker(victim, thief) as (url, (victim, thief)),
        await Bus.connect(url, thief, "thief") as theirs,
        await Bus.connect(url, victim, "victim") as mine,
    ):
        lost = naive = last = 0
        for trial in range(trials):
            guess = f"{victim.public}-{trial}-commitment"
            await _raw(theirs, thief, guess, b"x")
            naive += await _raw(mine, victim, guess, b"honest")
            # What can be known of a message beforehand: everything but its nonce and signature.
            message = cycle_pb2.Commitment(run=RUN, cycle=trial, digest=bytes(32))
            subject = ingress(RUN, victim.public, "commitment")
            forged = seal(thief, subject, message).SerializeToString()
            await _raw(theirs, thief, hashlib.sha256(forged).hexdigest(), b"x")
            # Each message of its own has the next number; one that was dropped has that of what was there before.
            number = await mine.publish_ingress(RUN, "commitment", message)
            lost += number <= last
            last = number
    return {
        "found": 1 - lost / trials, "accused": lost / trials, "earned": 0.0, "trials": trials,
        "dropped_with_guessable_ids": naive / trials,
    }  # fmt: skip


async def _raw(bus: Bus, identity: Identity, message_id: str, data: bytes) -> bool:
    """Publish with an id of one's own choice; whether the broker took it for a duplicate."""
    ack = await bus.js.publish(ingress(RUN, identity.public, "trained"), data, headers={"Nats-Msg-Id": message_id})
    return bool(ack.duplicate)


def flooded(quick: bool) -> dict[str, Any]:
    """Return flood with one key while others commit; measure their delay and the committer's backlog."""
    return asyncio.run(_flooded(500 if quick else 3000))


async def _flooded(count: int) -> dict[str, Any]:
    honest, flooder = [Identity.generate() for _ in range(4)], Identity.generate()
    async with (
        _Broker(flooder, *honest) as (url, (flooder, *honest)),
        await Bus.connect(url, flooder, "flooder") as loud,
    ):
        buses = [await Bus.connect(url, identity, "honest") for identity in honest]
        quiet = [await _commit(bus, 1) for bus in buses for _ in range(5)]
        message = cycle_pb2.Commitment(run=RUN, cycle=1, digest=bytes(32))
        subject = ingress(RUN, flooder.public, "commitment")
        data = [seal(flooder, subject, message).SerializeToString() for _ in range(count)]
        begun = time.perf_counter()
        # So many unanswered at once: attacker and honest miners share one process here, which must not be what is measured.
        slots = asyncio.Semaphore(100)

        async def shout(item: bytes) -> bool:
            async with slots:
                with suppress(Exception):
                    await loud.js.publish(subject, item)
                    return True
                return False

        flood = asyncio.gather(*map(shout, data))
        noisy = [await _commit(bus, 2) for _ in range(5) for bus in buses]
        taken = sum(await flood)
        seconds = time.perf_counter() - begun
        for bus in buses:
            await bus.close()
    state = CommitterState()
    state.put("run", 0, "miner", run_pb2.MinerEnrolled(run=RUN, miner=flooder.public), flooder.public)
    state.open("train", 1)
    state.open("commit", 1)
    begun = time.perf_counter()
    answers = [state.store(subject, item) for item in data]
    judged = time.perf_counter() - begun
    return {
        "found": round(sum(answer != "accepted" for answer in answers[1:]) / (count - 1), 4),
        "accused": 0.0,
        "earned": 0.0,
        "trials": count,
        "flood_per_second": round(taken / seconds),
        "honest_ack_ms": [round(1000 * statistics.median(quiet), 2), round(1000 * statistics.median(noisy), 2)],
        "honest_ack_ms_worst": [round(1000 * max(quiet), 2), round(1000 * max(noisy), 2)],
        "judged_per_second": round(count / judged),
    }


async def _commit(bus: Bus, cycle: int) -> float:
    message = cycle_pb2.Commitment(run=RUN, cycle=cycle, digest=bytes(32))
    begun = time.perf_counter()
    await bus.publish_ingress(RUN, "commitment", message)
    return time.perf_counter() - begun


class _Broker:
    """A nats-server with every stream; yields its address and these miners with a miner's passes."""

    def __init__(self, *miners: Identity) -> None:
        self._miners = miners

    async def __aenter__(self) -> tuple[str, list[Identity]]:
        self._folder = tempfile.TemporaryDirectory()
        accounts = Accounts(Path(self._folder.name))
        accounts.make()
        self._server = NatsServer(Path(self._folder.name) / "nats", accounts=accounts)
        await asyncio.to_thread(self._server.start)
        operator = accounts.welcome("operator", Identity.generate())
        async with await Bus.connect(self._server.url, operator, "declare") as bus:
            await streams.ensure(bus.js)
        return self._server.url, [accounts.welcome("miner", miner) for miner in self._miners]

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._server.stop)
        self._folder.cleanup()


MESSAGE_ATTACKS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "replay of commitments": replays,
    "wrong window": wrong_windows,
    "seed withholding": withheld,
    "message-id poisoning": poisoned,
    "flooding": flooded,
}
