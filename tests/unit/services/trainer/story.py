"""A run told fact by fact, as a miner sees it."""

from __future__ import annotations

from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import FactKey
from google.protobuf.message import Message

RUN = "r1"
ME = "UME"
STATE = ArtifactRef(digest="5" * 64, size=100, realm="REALM_PUBLIC")


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

    def enrolled(self, miner: str = ME) -> Story:
        return self.say("run", 0, "miner", run_pb2.MinerEnrolled(run=RUN, miner=miner), miner)

    def selected(self) -> Story:
        return self.say("run", 0, "selected", run_pb2.SelectionMade(run=RUN, initial_state=STATE))

    def ended(self) -> Story:
        return self.say("run", 0, "ended", run_pb2.RunEnded(run=RUN))

    def opened(self, window: str, cycle: int = 1) -> Story:
        return self.say(window, cycle, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=cycle, state=STATE))

    def closed(self, window: str, cycle: int = 1) -> Story:
        return self.say(window, cycle, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=cycle))

    def commitment_accepted(self, digest: str, cycle: int = 1, miner: str = ME) -> Story:
        accepted = cycle_pb2.CommitmentAccepted(run=RUN, cycle=cycle, miner=miner, digest=bytes.fromhex(digest))
        return self.say("commit", cycle, "accepted", accepted, miner)

    def refused(
        self, window: str, cycle: int = 1, reason: reasons_pb2.Reason = reasons_pb2.REASON_MALFORMED, miner: str = ME
    ) -> Story:
        number = self._sequence + 1
        refused = cycle_pb2.Refused(
            run=RUN, cycle=cycle, miner=miner, reason=reason, detail="because", ingress_sequence=number
        )
        return self.say(window, cycle, "refused", refused, f"{miner}-{number}")

    def commit_settled(self, *miners: str, cycle: int = 1) -> Story:
        return self.say("commit", cycle, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=cycle, committed=miners))

    def reveal_accepted(self, cycle: int = 1, origin: int | None = None) -> Story:
        submission = cycle_pb2.Submission(miner=ME, origin_cycle=cycle if origin is None else origin)
        return self.say(
            "submit", cycle, "accepted", cycle_pb2.RevealAccepted(run=RUN, cycle=cycle, submission=submission), ME
        )

    def scored(self, verdict: cycle_pb2.Verdict, cycle: int = 1) -> Story:
        return self.say("merge", cycle, "scored", cycle_pb2.CycleScored(run=RUN, cycle=cycle, verdicts=[verdict]))
