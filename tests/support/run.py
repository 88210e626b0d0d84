"""A run told fact by fact, as the broker would store it: one message a subject, a sequence a stream, a clock.

    run = Run("medical").created().selected().miners("UA", "UB").validators("UV")
    run.opened("train").trained("UA").closed("train")
    run.say("merge", 1, "scored", verdicts=[…])

`say` takes the type of a message, and the id in its subject, from the catalogue of facts; verbs that are named like
their fact add what most tests leave alone. Everything ends in `store`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, Self

from connito.bus.streams import stream_of
from connito.protocol import bans
from connito.protocol.asked import ORDER_SUBJECT
from connito.protocol.beacon import draw_seed, secret_digest
from connito.protocol.findings import PROTOCOL_VERSION
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2, run_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.envelope import seal
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.subjects import FactKey, fact, ingress
from connito.wire.verification import CATALOGUE, ENROL_SUBJECT, INGRESS
from google.protobuf.message import Message

RUN = "r1"
ME, OTHER = "UME", "UOTHER"
CLOSED_BY = {"validate": "VALIDATE", "merge": "MERGE"}  # the stream whose sequence closes a window; else INGRESS


def theta(version: int, size: int = 1000) -> ArtifactRef:
    """The state of a version; 0 is the initial one."""
    return ref(f"{version:064x}", size)


def ref(digest: str, size: int = 10, realm: artifacts_pb2.Realm.ValueType = REALM_PUBLIC) -> ArtifactRef:
    return ArtifactRef(digest=digest, size=size, media_type="application/octet-stream", realm=realm)


def secret_of(validator: str, cycle: int = 1) -> bytes:
    """What a validator commits to and reveals."""
    return f"{validator}/{cycle}".encode().ljust(32, b".")


def _secret(secret: bytes | None, validator: str, cycle: int) -> bytes:
    return secret_of(validator, cycle) if secret is None else secret


def ordered(spec: run_pb2.RunSpec, customer: Identity) -> run_pb2.RunCreated:
    """A run as its customer asked for it, to the letter; the same bytes each time."""
    asked = run_pb2.RunSpec()
    asked.CopyFrom(spec)
    asked.customer = customer.public
    return run_pb2.RunCreated(spec=asked, order=seal(customer, ORDER_SUBJECT, asked, now_ms=1, nonce=b"o" * 16))


def enrolment(run: str, miner: Identity, label: str = "", **asked: Any) -> run_pb2.MinerEnrolled:
    """What the coordinator writes of a miner that asked for it; the same bytes each time."""
    command = services_pb2.EnrolMinerCommand(run=run, label=label, **asked)
    order = seal(miner, ENROL_SUBJECT, command, now_ms=1, nonce=b"e" * 16)
    return run_pb2.MinerEnrolled(run=run, miner=miner.public, label=label, order=order)


def even(validator: str) -> float:
    """A stake as everybody has it."""
    return 1.0


class Run:
    """The facts of one run and the log that they came from. `now` is the broker's clock, `step_ms` what each takes."""

    def __init__(self, domain: str = "medical", name: str = RUN, *, now: int = 1_000_000, step_ms: int = 0) -> None:
        self.domain, self.name, self.now, self.step_ms = domain, name, now, step_ms
        self.log: list[Fact] = []
        self.facts = RunFacts(name)
        self.sequences: dict[str, int] = {}

    # How facts are stored

    def store(self, subject: str, key: FactKey, message: Message, signer: str) -> Fact:
        """What the broker does. Of two messages on one subject the first stands."""
        stream = stream_of(subject)
        self.now += self.step_ms
        sequence = self.sequences[stream] = self.last(stream) + 1
        stored = Fact(self.name, key, message, signer, stream, sequence, self.now)
        self.log.append(stored)
        self.facts.add(stored)
        return stored

    def last(self, stream: str) -> int:
        """The last sequence of a stream."""
        return self.sequences.get(stream, 0)

    def publish(self, section: str, cycle: int, kind: str, message: Message, id_: str = "", signer: str = "") -> bool:
        """Write a fact as `Bus.publish_fact` does: whether it was the first on its subject."""
        if self.facts.has(section, cycle, kind, id_):
            return False
        self.store(fact(self.name, section, cycle, kind, id_), FactKey(section, cycle, kind, id_), message, signer)
        return True

    def put(self, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> Self:
        """Write a fact in place of what stands there."""
        self.drop(section, cycle, kind, id_).publish(section, cycle, kind, message, id_)
        return self

    def say(self, section: str, cycle: int, kind: str, /, **fields: Any) -> Self:
        """Write a fact by its fields."""
        message_type, role, id_path = CATALOGUE[section, kind]
        message = self._message(message_type, cycle, section, fields)
        id_ = "-".join(str(attrgetter(path)(message)) for path in id_path.split("+")) if id_path else ""
        self.publish(section, cycle, kind, message, id_, id_ if role == "validator" else role)
        return self

    def hear(self, miner: str, kind: str, cycle: int = 1, /, **fields: Any) -> Fact:
        """A miner's message."""
        message = self._message(INGRESS[kind], cycle, "", fields)
        return self.store(ingress(self.name, miner, kind), FactKey("ingress", cycle, kind, miner), message, miner)

    def _message(self, of: type[Message], cycle: int, window: str, fields: dict[str, Any]) -> Message:
        known = of.DESCRIPTOR.fields_by_name
        given: dict[str, Any] = {"run": self.name, "cycle": cycle, "window": f"WINDOW_{window.upper()}"}
        return of(**{name: value for name, value in given.items() if name in known} | fields)

    def drop(self, section: str, cycle: int, kind: str, id_: str = "") -> Self:
        """Forget a fact, as if it had never been written."""
        self.log = [one for one in self.log if one.key != FactKey(section, cycle, kind, id_)]
        self.facts = RunFacts(self.name)
        for one in self.log:
            self.facts.add(one)
        return self

    # The run

    def spec(self, **fields: Any) -> run_pb2.RunSpec:
        given: dict[str, Any] = {
            "run": self.name,
            "domain": self.domain,
            "cycles": 3,
            "protocol_version": PROTOCOL_VERSION,
        }
        return run_pb2.RunSpec(**given | fields)

    def created(self, spec: run_pb2.RunSpec | None = None, /, **fields: Any) -> Self:
        return self.say("run", 0, "created", spec=spec or self.spec(**fields))

    def selected(self, **fields: Any) -> Self:
        return self.say("run", 0, "selected", **{"initial_state": theta(0)} | fields)

    def miners(self, *miners: str, label: str = "") -> Self:
        for miner in miners:
            self.say("run", 0, "miner", miner=miner, label=label)
        return self

    def validators(self, *validators: str, stakes: Mapping[str, float] | None = None) -> Self:
        """Validators who join, and what their votes weigh: 1, but for `stakes`."""
        for validator in validators:
            self.say("run", 0, "validator", validator=validator)
            self.say("run", 0, "stake", validator=validator, stake=(stakes or {}).get(validator, 1.0))
        return self

    def banned(self, miner: str, number: int = 1, *, lifted: bool = False) -> Self:
        return self.say("run", 0, "ban", miner=miner, number=number, why="floods", lifted=lifted)

    def ended(self, outcome: run_pb2.RunOutcome.ValueType = run_pb2.RUN_OUTCOME_COMPLETED, **fields: Any) -> Self:
        return self.say("run", 0, "ended", outcome=outcome, **fields)

    # Windows

    def state(self, cycle: int) -> ArtifactRef:
        """What a cycle starts from."""
        return theta(cycle - 1)

    def opened(self, window: str, cycle: int = 1, expected: Iterable[str] | None = None, **fields: Any) -> Self:
        """Open a window, for everybody who has something to do in it unless told otherwise; a cycle behind its head."""
        if window == "train":
            self.headed(cycle)
        if expected is None:
            miners, validators = self.facts.miners, self.facts.validators
            expected = {"train": [*miners, *validators], "validate": validators, "merge": []}.get(window, miners)
        given = {"state": self.state(cycle), "version": cycle - 1, "expected": sorted(expected)}
        return self.say(window, cycle, "opened", **given | fields)

    def headed(self, number: int = 1) -> Self:
        """Stand for the log so far, unless a head of this number does."""
        return self if self.facts.head(number) else self.say("run", number, "head", checkpoint=f"head {number}")

    def closed(self, window: str, cycle: int = 1, **fields: Any) -> Self:
        """Close a window at what its stream holds, with who is banned by then."""
        stream = CLOSED_BY.get(window, "INGRESS")
        given: dict[str, Any] = {"stream": stream, "last_sequence": self.last(stream)}
        if banned := bans.banned(self.facts):
            given |= {"runs_sequence": self.last("RUNS"), "banned": sorted(banned)}
        return self.say(window, cycle, "closed", **given | fields)

    def settled(self, window: str, cycle: int = 1, **fields: Any) -> Self:
        """What the committer finds inside a window: unless told otherwise, what it accepted before
        the close."""
        closed = self.facts.window(window, cycle).closed
        if closed is None and not fields:
            return self
        last = 0 if closed is None else closed.last_sequence
        if not fields and window == "commit":
            accepted = self.facts.commitments(cycle).items()
            fields["committed"] = [miner for miner, one in accepted if one.message.ingress_sequence <= last]
        elif not fields:
            fields["submissions"] = [reveal.message.submission for reveal in self.facts.reveals(cycle).values()]
        return self.say(window, cycle, "settled", **{"last_sequence": last} | fields)

    # What miners do, and what the committer makes of it

    def trained(self, miner: str, cycle: int = 1, **fields: Any) -> Self:
        self.hear(miner, "trained", cycle, **fields)
        return self

    def committed(self, miner: str, cycle: int = 1, digest: bytes = b"d" * 32) -> Self:
        """A commitment that is accepted."""
        sequence = self.hear(miner, "commitment", cycle, digest=digest).sequence
        return self.say("commit", cycle, "accepted", miner=miner, digest=digest, ingress_sequence=sequence)

    def submitted(self, miner: str, cycle: int = 1, **submission: Any) -> Self:
        """A reveal that is accepted."""
        sequence = self.hear(miner, "reveal", cycle, artifact=submission.get("artifact")).sequence
        given = {"miner": miner, "reveal_sequence": sequence, "origin_cycle": cycle}
        return self.say("submit", cycle, "accepted", submission=given | submission)

    def refused(
        self,
        window: str,
        miner: str = ME,
        cycle: int = 1,
        reason: reasons_pb2.Reason.ValueType = reasons_pb2.REASON_MALFORMED,
        **fields: Any,
    ) -> Self:
        given = {"miner": miner, "reason": reason, "detail": "because", "ingress_sequence": len(self.log)}
        return self.say(window, cycle, "refused", **given | fields)

    # What validators, the coordinator and the aggregator do

    def seed_committed(self, validator: str = ME, cycle: int = 1, secret: bytes | None = None) -> Self:
        digest = secret_digest(self.name, cycle, validator, _secret(secret, validator, cycle))
        return self.say("train", cycle, "seed", validator=validator, digest=digest)

    def seed_revealed(self, validator: str = ME, cycle: int = 1, secret: bytes | None = None) -> Self:
        return self.say("validate", cycle, "seed", validator=validator, secret=_secret(secret, validator, cycle))

    def drawn(self, *validators: str, cycle: int = 1, seed: bytes = b"", **fields: Any) -> Self:
        fields.setdefault("last_sequence", self.last("VALIDATE"))
        chosen = seed or draw_seed(self.name, cycle, {one: secret_of(one, cycle) for one in validators})
        return self.say("validate", cycle, "drawn", seed=chosen, validators=sorted(validators), **fields)

    def reported(self, validator: str = ME, cycle: int = 1, **fields: Any) -> Self:
        return self.say("validate", cycle, "report", validator=validator, **fields)

    def scored(self, *verdicts: cycle_pb2.Verdict, cycle: int = 1, **fields: Any) -> Self:
        return self.say("merge", cycle, "scored", verdicts=verdicts, **fields)

    def merged(self, cycle: int = 1, **fields: Any) -> Self:
        """The version that a cycle publishes."""
        return self.say("merge", cycle, "version", version=cycle, parent=cycle - 1, **{"state": theta(cycle)} | fields)
