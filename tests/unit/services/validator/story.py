"""A run told fact by fact, as a validator sees it."""

from __future__ import annotations

from collections.abc import Sequence

from connito.protocol.beacon import draw_seed, secret_digest
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import FactKey
from google.protobuf.message import Message

RUN = "r1"
ME, OTHER = "UME", "UOTHER"
STATE = ArtifactRef(digest="5" * 64, size=100, realm="REALM_PUBLIC")


def secret_of(validator: str, cycle: int = 1) -> bytes:
    return f"{validator}/{cycle}".encode().ljust(32, b".")


def my_secret(run: str, cycle: int) -> bytes:
    assert run == RUN
    return secret_of(ME, cycle)


class Story:
    """Facts of one run, each added by a method that reads like the event."""

    def __init__(self) -> None:
        self.facts = RunFacts(RUN)
        self._sequence = 0

    def say(self, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> Story:
        self._sequence += 1
        key = FactKey(section, cycle, kind, id_)
        self.facts.add(Fact(RUN, key, message, "", section.upper(), self._sequence, self._sequence))
        return self

    def created(self) -> Story:
        return self.say("run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run=RUN, cycles=3)))

    def joined(self, validator: str = ME) -> Story:
        return self.say("run", 0, "validator", run_pb2.ValidatorJoined(run=RUN, validator=validator), validator)

    def selected(self) -> Story:
        return self.say("run", 0, "selected", run_pb2.SelectionMade(run=RUN, initial_state=STATE))

    def ended(self) -> Story:
        return self.say("run", 0, "ended", run_pb2.RunEnded(run=RUN))

    def opened(self, window: str, cycle: int = 1, expected: Sequence[str] = (ME, OTHER)) -> Story:
        message = cycle_pb2.WindowOpened(run=RUN, cycle=cycle, state=STATE, expected=expected)
        return self.say(window, cycle, "opened", message)

    def closed(self, window: str, cycle: int = 1) -> Story:
        return self.say(window, cycle, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=cycle))

    def submit_settled(self, cycle: int = 1) -> Story:
        return self.say("submit", cycle, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=cycle))

    def seed_committed(self, validator: str = ME, cycle: int = 1, secret: bytes = b"") -> Story:
        digest = secret_digest(RUN, cycle, validator, secret or secret_of(validator, cycle))
        message = cycle_pb2.SeedCommitted(run=RUN, cycle=cycle, validator=validator, digest=digest)
        return self.say("train", cycle, "seed", message, validator)

    def seed_revealed(self, validator: str = ME, cycle: int = 1, secret: bytes = b"") -> Story:
        revealed = cycle_pb2.SeedRevealed(
            run=RUN, cycle=cycle, validator=validator, secret=secret or secret_of(validator, cycle)
        )
        return self.say("validate", cycle, "seed", revealed, validator)

    def drawn(self, *validators: str, cycle: int = 1, seed: bytes = b"") -> Story:
        seed = seed or draw_seed(RUN, cycle, {validator: secret_of(validator, cycle) for validator in validators})
        message = cycle_pb2.SeedDrawn(run=RUN, cycle=cycle, seed=seed, validators=validators)
        return self.say("validate", cycle, "drawn", message)

    def reported(self, validator: str = ME, cycle: int = 1) -> Story:
        report = cycle_pb2.ScoreReport(run=RUN, cycle=cycle, validator=validator)
        return self.say("validate", cycle, "report", report, validator)
