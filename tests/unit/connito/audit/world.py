"""A run of two cycles, told message by message and signed, with its artifacts: what an auditor is given.

Three validators; miner A and B do honest work, C copies A, L reveals its first work late. The model is not there: a
state's loss is its distance to a point, and what validators measured is a table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from connito.audit import recompute
from connito.audit.artifacts import Artifacts, gather
from connito.audit.evidence import Evidence, read
from connito.data.corpus import Corpus
from connito.data.manifest import FileEntry, Manifest
from connito.data.tensors import read_tensors, tensor_bytes
from connito.errors import NotFound, VerificationFailed
from connito.protocol import bans, progress
from connito.protocol.beacon import draw_seed
from connito.protocol.commitment import commitment_digest
from connito.protocol.findings import PROTOCOL_VERSION
from connito.protocol.merging.cycle import merge_cycle
from connito.protocol.merging.earlier import EarlierWork, earlier_works
from connito.protocol.merging.gate import Losses
from connito.protocol.merging.opened import Files
from connito.protocol.scoring.proof_of_loss import score_submission
from connito.store import ref_of_bytes
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef
from connito.v1.envelope_pb2 import Envelope
from connito.wire.checkpoint import Checkpoint, cosignature
from connito.wire.envelope import seal
from connito.wire.fact import Fact, Record
from connito.wire.heads import LogTrees, ingress_origin_of, leaf_of
from connito.wire.identity import Identity
from connito.wire.merkle import Tree
from connito.wire.roster import ROLES, Roster
from connito.wire.subjects import FactKey, ingress
from google.protobuf.message import Message

from tests.support.run import Run, enrolment, ordered

RUN = "run-1"
TARGET, GENERAL = "recipes", "logs"
LENGTH = 4
TENSOR = "layers.0.down_proj"
GOAL = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], np.float32)
WORK = {"A": [0.3, 0.3, 0.2], "B": [0.1, 0.3, 0.4], "C": [0.3, 0.3, 0.2], "L": [0.2, 0.2, 0.2]}
GAIN = {"A": 0.30, "B": 0.20, "C": 0.30, "L": 0.10}


@functools.cache
def identity(name: str) -> Identity:
    return Identity.generate(name.encode().ljust(32, b"."))


MINERS = {name: identity(f"miner {name}").public for name in WORK}
VALIDATORS = {name: identity(f"validator {name}").public for name in "123"}
ROSTER = Roster(
    {role: frozenset({identity(role).public}) for role in ROLES if role != "validator"}
    | {"validator": frozenset(VALIDATORS.values()), "operator": frozenset({identity("operator").public})}
)


def distance(part: str, digest: str, path: Path) -> Losses:
    """What the gate measures: squared distance to the goal, and for general text how far the state went beyond 40."""
    value = read_tensors(path, [TENSOR])[0][TENSOR]
    away = max(0.0, float(np.square(value).sum()) - 40.0)
    rows = tuple(float(np.square(row).sum()) for row in value - GOAL)
    return Losses({TARGET: (math.fsum(rows), 7), GENERAL: (away, 5)}, {TARGET: (rows, (4, 3))})


class World(Run):
    """A run as signed records, and the store as bytes by digest; it has what a `Source` has."""

    def __init__(self) -> None:
        super().__init__(TARGET, RUN, now=1_700_000_000_000, step_ms=10)
        self.records: list[Record] = []
        self.objects: dict[str, bytes] = {}

    def upload(
        self, data: bytes, realm: artifacts_pb2.Realm.ValueType = REALM_PUBLIC, media_type: str = ""
    ) -> ArtifactRef:
        ref = ref_of_bytes(data, media_type, realm)
        self.objects[ref.digest] = data
        return ref

    def store(self, subject: str, key: FactKey, message: Message, signer: str) -> Fact:
        """Sign with the key of a role or with one that is given, and keep the record."""
        stored = super().store(subject, key, message, signer)
        who = next((one for one in _everybody() if one.public == signer), None) or identity(signer)
        data = seal(who, subject, message, now_ms=stored.time_unix_ms).SerializeToString()
        self.records.append(Record(stored.stream, stored.sequence, subject, data, stored.time_unix_ms))
        return stored

    def created(self, spec: run_pb2.RunSpec | None = None, /, **fields: Any) -> Self:
        """As the customer asked for it."""
        message = ordered(spec or self.spec(**fields), identity("customer"))
        self.publish("run", 0, "created", message, signer="coordinator")
        return self

    def miners(self, *miners: str, label: str = "") -> Self:
        """As each of them asked for it."""
        for who in (one for key in miners for one in _everybody() if one.public == key):
            self.publish("run", 0, "miner", enrolment(RUN, who, label), who.public, signer="coordinator")
        return self

    def head(self) -> None:
        """What the coordinator signs next, and the validators after it; and the committer's receipt."""
        facts, trees, said = self.evidence().facts, LogTrees(), Tree()
        for record in self.records:
            trees.of(RUN).add(record)
            if record.stream == "INGRESS":
                said.append(leaf_of(record))
        number = facts.next_head
        receipt = Checkpoint(ingress_origin_of(facts), said.size, said.root).signed(identity("committer"))
        last = self.last("INGRESS")
        given = run_pb2.IngressHead(run=RUN, cycle=number, checkpoint=receipt.note, last_sequence=last)
        self.publish("run", number, "received", given, signer="committer")
        trees.of(RUN).add(self.records[-1])
        if number > 1:
            trees.checkpoint(facts, number - 1)
        head = trees.of(RUN).head(facts, identity("coordinator"))
        self.publish("run", number, "head", head, signer="coordinator")
        checkpoint = Checkpoint.parse(head.checkpoint)
        for name, key in VALIDATORS.items():
            line = cosignature(checkpoint, identity(f"validator {name}"), self.now // 1000)
            message = run_pb2.HeadCosigned(run=RUN, cycle=number, validator=key, signature=line)
            self.publish("run", number, "cosigned", message, key, key)

    def evidence(self) -> Evidence:
        return read(RUN, self.records, ROSTER)

    async def fetch(self, ref: ArtifactRef) -> Path:
        if ref.digest not in self.objects:
            raise NotFound("is not in the store")
        data = self.objects[ref.digest]
        if ref_of_bytes(data, "", ref.realm).digest != ref.digest:
            raise VerificationFailed("does not have this digest in the store")
        path = self.folder / ref.digest
        path.write_bytes(data)
        return path

    folder: Path

    async def artifacts(self, folder: Path) -> Artifacts:
        self.folder = folder
        return await gather(self.evidence(), self)

    def copy(self) -> World:
        other = World()
        other.records, other.objects = list(self.records), dict(self.objects)
        other.sequences, other.now = dict(self.sequences), self.now
        return other

    def find(self, ending: str) -> int:
        """Index of the first record whose subject ends so (after the run), `{A}` standing for miner A's key."""
        wanted = ending.format(**MINERS, **{f"v{name}": key for name, key in VALIDATORS.items()})
        found = [i for i, r in enumerate(self.records) if r.subject.split(".", 3)[-1] == wanted]
        assert found, wanted
        return found[0]

    def flip(self, index: int, at: int) -> None:
        record = self.records[index]
        data = bytearray(record.data)
        data[at % len(data)] ^= 1
        self.records[index] = replace(record, data=bytes(data))

    def resign(self, ending: str, change: Callable[[Any], object], message_type: type[Message]) -> None:
        """Change a message and sign it again with the key that signed it: what whoever holds that key can do."""
        index = self.find(ending)
        record = self.records[index]
        envelope = Envelope.FromString(record.data)
        message = message_type.FromString(envelope.payload)
        change(message)
        signer = next(i for i in _everybody() if i.public == envelope.signer)
        data = seal(signer, record.subject, message, now_ms=record.time_unix_ms).SerializeToString()
        self.records[index] = replace(record, data=data)


def _everybody() -> Iterable[Identity]:
    yield from (identity(role) for role in ROLES)
    yield identity("operator")
    yield from (identity(f"miner {name}") for name in MINERS)
    yield from (identity(f"validator {name}") for name in VALIDATORS)


def state(value: Any, version: str = "") -> bytes:
    return tensor_bytes({TENSOR: np.asarray(value, np.float32)}, {"version": version} if version else {})


def corpus(domain: str, salt: int) -> bytes:
    documents = [[(salt * 31 + 7 * i + j) % 250 for j in range(9)] for i in range(40)]
    return Corpus.from_documents(documents, {"domain": domain, "separator": "255", "split": "holdout"}).to_bytes()


REWARDS = run_pb2.RewardPolicy(payout="proportional", bond_rate=0.1)


def spec_of(world: World, rewards: run_pb2.RewardPolicy) -> run_pb2.RunSpec:
    config = world.upload(b"{}")
    entry = FileEntry("config.json", config.digest, config.size, "application/json")
    manifest = world.upload(Manifest({"config.json": entry}, {}, "tiny").to_bytes())

    def text(domain: str, salt: int, realm: Any) -> run_pb2.CorpusRef:
        return run_pb2.CorpusRef(domain=domain, artifact=world.upload(corpus(domain, salt), realm))

    return run_pb2.RunSpec(
        run=RUN,
        domain=TARGET,
        cycles=2,
        emission=1000,
        base=run_pb2.BaseRef(name="tiny", manifest=manifest),
        probe=text(TARGET, 1, REALM_PUBLIC),
        train=text(TARGET, 2, REALM_PUBLIC),
        holdout=text(TARGET, 3, REALM_HOLDOUT),
        general_holdouts=[text(GENERAL, 4, REALM_HOLDOUT)],
        training=run_pb2.TrainPolicy(sequence_length=LENGTH),
        scoring=run_pb2.ScorePolicy(
            target_sequences=6, general_sequences=4, confidence=0.9, retention_margin=0.1, copy_threshold=0.999,
            paid_ranks=2, max_relative_norm=10,
        ),
        merging=run_pb2.MergePolicy(
            aggregator="mean", outer_learning_rate=0.7, outer_momentum=0.9, gate_general_margin=0.1,
            gate_target_sequences=2, gate_general_sequences=2, report_target_sequences=2, report_general_sequences=2,
            step_codec="int8", gate_target_margin=0.05,
        ),
        windows=run_pb2.WindowPolicy(min_miners=1, min_validators=2),
        rewards=rewards, protocol_version=PROTOCOL_VERSION,
    )  # fmt: skip


def number_of(window: str) -> cycle_pb2.Window.ValueType:
    return cycle_pb2.Window.Value(f"WINDOW_{window.upper()}")


CLOSED_BY_DEADLINE = cycle_pb2.CLOSE_CAUSE_DEADLINE


class Cycle:
    """One cycle, told in the order in which it happens."""

    def __init__(self, world: World, spec: run_pb2.RunSpec, number: int, version: int, theta: ArtifactRef) -> None:
        self.world, self.spec, self.number = world, spec, number
        self.version, self.theta = version, theta
        self.miners = list(WORK) if number == 1 else ["A", "B", "C"]
        self.reveals: dict[str, cycle_pb2.Reveal] = {}

    def open(self, window: str, expected: Iterable[str] = ()) -> None:
        self.world.opened(window, self.number, expected, state=self.theta, version=self.version)

    def close(self, window: str, cause: Any = cycle_pb2.CLOSE_CAUSE_ALL_ACTED) -> int:
        self.world.closed(window, self.number, cause=cause)
        return self.world.facts.window(window, self.number).require_closed().last_sequence

    def secret(self, validator: str) -> bytes:
        return f"{validator}/{self.number}".encode().ljust(32, b".")

    def train(self) -> None:
        self.world.head()
        self.open("train", [*(MINERS[name] for name in self.miners), *VALIDATORS.values()])
        for name in self.miners:
            self.world.trained(MINERS[name], self.number, steps=3)
        for name, key in VALIDATORS.items():
            self.world.seed_committed(key, self.number, self.secret(name))
        self.close("train")

    def commit(self) -> None:
        self.open("commit", [MINERS[name] for name in self.miners])
        start = read_tensors(self.world.objects[self.theta.digest], [TENSOR])[0][TENSOR]
        for name in self.miners:
            artifact = self.world.upload(state(start + np.array(WORK[name], np.float32), name), REALM_SUBMISSION)
            salt = name.encode().ljust(16, b"-")
            miner, base = MINERS[name], self.theta.digest
            digest = commitment_digest(RUN, self.number, miner, base, artifact.digest, salt)
            self.reveals[name] = cycle_pb2.Reveal(
                run=RUN, cycle=self.number, artifact=artifact, base_state_digest=base, salt=salt
            )
            self.world.committed(miner, self.number, digest)
        self.again("A")
        self.close("commit")
        self.world.settled("commit", self.number)

    def again(self, name: str) -> None:
        """A second commitment, which is refused."""
        said = self.world.hear(MINERS[name], "commitment", self.number, digest=b"2" * 32)
        self.refuse("commit", name, said.sequence, reasons_pb2.REASON_DUPLICATE_COMMITMENT)

    def refuse(self, window: str, name: str, sequence: int, reason: reasons_pb2.Reason.ValueType) -> None:
        finding = cycle_pb2.Finding(text="no")
        self.world.say(
            window, self.number, "refused", miner=MINERS[name], reason=reason, finding=finding,
            ingress_sequence=sequence,
        )  # fmt: skip

    def submit(self, rolled: Iterable[cycle_pb2.Submission]) -> None:
        self.open("submit", [MINERS[name] for name in self.miners])
        self.submissions = []
        for name in self.on_time():
            sequence = self.reveal(name)
            self.submissions.append(self.submission(name, sequence))
            self.accept(self.submissions[-1])
        self.close("submit", CLOSED_BY_DEADLINE if "L" in self.miners else cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
        for name in self.on_time():
            self.leave_out(name)
        for entry in rolled:
            self.submissions.append(entry)
            self.accept(entry)
        if "L" in self.miners:
            self.refuse("submit", "L", 0, reasons_pb2.REASON_NOT_REVEALED)
        self.submissions.sort(key=lambda entry: entry.commit_sequence)
        self.world.settled("submit", self.number, submissions=self.submissions)

    def on_time(self) -> list[str]:
        return [name for name in self.miners if name != "L"]

    def leave_out(self, name: str) -> None:
        """What was accepted of a miner that is banned by the close does not count."""
        own = next(entry for entry in self.submissions if entry.miner == MINERS[name])
        if MINERS[name] in bans.at_close(self.world.facts, "submit", self.number):
            self.submissions.remove(own)
            self.refuse("submit", name, own.reveal_sequence, reasons_pb2.REASON_BANNED)

    def ban(self, name: str, by: str = "operator", *, lifted: bool = False) -> None:
        miner = MINERS[name]
        order = run_pb2.BanOrder(run=RUN, miner=miner, why="floods", lifted=lifted)
        number = bans.number_after(self.world.facts, miner)
        message = run_pb2.MinerBan(run=RUN, miner=miner, number=number, why="floods", lifted=lifted)
        message.order.CopyFrom(seal(identity(by), bans.ORDER_SUBJECT, order))
        self.world.publish("run", 0, "ban", message, f"{miner}-{number}", "coordinator")

    def reveal(self, name: str) -> int:
        subject, key = ingress(RUN, MINERS[name], "reveal"), FactKey("ingress", self.number, "reveal", MINERS[name])
        return self.world.store(subject, key, self.reveals[name], MINERS[name]).sequence

    def submission(self, name: str, sequence: int) -> cycle_pb2.Submission:
        return cycle_pb2.Submission(
            miner=MINERS[name], artifact=self.reveals[name].artifact, origin_cycle=self.number,
            commit_sequence=self.commit_sequence(name), reveal_sequence=sequence, base_state=self.theta,
        )  # fmt: skip

    def commit_sequence(self, name: str) -> int:
        accepted = self.world.facts.commitment(self.number, MINERS[name])
        assert accepted is not None
        return accepted.ingress_sequence

    def accept(self, entry: cycle_pb2.Submission) -> None:
        self.world.say("submit", self.number, "accepted", submission=entry)

    def late(self) -> cycle_pb2.Submission:
        """L reveals after the window: refused here, scored in the next cycle."""
        sequence = self.reveal("L")
        self.refuse("submit", "L", sequence, reasons_pb2.REASON_LATE_REVEAL)
        return self.submission("L", sequence)

    def validate(self, artifacts: Artifacts) -> None:
        self.open("validate", VALIDATORS.values())
        for name, key in VALIDATORS.items():
            self.world.seed_revealed(key, self.number, self.secret(name))
        seed = draw_seed(RUN, self.number, {key: self.secret(name) for name, key in VALIDATORS.items()})
        self.world.drawn(*VALIDATORS.values(), cycle=self.number, seed=seed)
        numbers = recompute.draw_of(self.spec, artifacts, seed)
        for key in VALIDATORS.values():
            scores = [self.score(entry, numbers) for entry in self.submissions]
            self.world.reported(key, self.number, seed=seed, state_digest=self.theta.digest, scores=scores, seconds=1.5)
        self.close("validate")

    def score(self, entry: cycle_pb2.Submission, numbers: list[tuple[str, int]]) -> cycle_pb2.SubmissionScore:
        name = next(name for name, key in MINERS.items() if key == entry.miner)
        losses = []
        for domain, number in numbers:
            before = 10.0 + number * 0.01
            gain = LENGTH * GAIN[name] * (1 + 0.01 * number) if domain == TARGET else 0.01
            loss: dict[str, Any] = {
                "domain": domain,
                "sequence": number,
                "tokens": LENGTH,
                "before": before,
                "after": before - gain,
            }
            losses.append(cycle_pb2.SequenceLoss(**loss))
        return score_submission(entry.miner, entry.artifact.digest, losses, TARGET, self.spec.scoring)

    def merge(self, folder: Path) -> cycle_pb2.VersionPublished:
        from connito.audit.judging import consensus_of

        self.open("merge")
        evidence = self.world.evidence()
        for digest, data in self.world.objects.items():
            (folder / digest).write_bytes(data)
        previous = evidence.facts.version(self.number - 1)
        files = Files(
            folder / self.theta.digest,
            None if previous is None else folder / previous.outer_state.digest,
            {entry.miner: folder / entry.artifact.digest for entry in self.submissions},
            {entry.miner: folder / entry.base_state.digest for entry in self.submissions},
            [
                EarlierWork(one, folder / one.artifact.digest, folder / one.base_state.digest)
                for one in earlier_works(evidence.facts, self.number)
            ],
        )
        submissions = evidence.facts.window("submit", self.number).submissions
        agreed = consensus_of(evidence, self.number, submissions)
        merged = merge_cycle(evidence.facts, self.number, submissions, agreed, {}, files, distance, folder)
        for path in (merged.state, merged.momentum, *([merged.step] if merged.step else [])):
            self.world.upload(path.read_bytes())
        self.world.publish("merge", self.number, "scored", merged.scored, signer="aggregator")
        self.world.publish("merge", self.number, "version", merged.version, signer="aggregator")
        self.close("merge")
        return merged.version


def tell(
    folder: Path,
    rewards: run_pb2.RewardPolicy = REWARDS,
    story: type[Cycle] = Cycle,
    scored: str = "",
) -> World:
    """The whole run. `scored`: it names a benchmark, whose score comes `before` its expert's deposit, or `after` it."""
    world = World()
    world.folder = folder
    spec = spec_of(world, rewards)
    if scored:
        spec.benchmarks.add(domain="exam", artifact=world.upload(b"an exam", REALM_HOLDOUT))
    world.created(spec)
    spec = world.facts.require_spec()
    for name, key in MINERS.items():
        world.miners(key, label=f"miner-{name}")
    world.validators(*VALIDATORS.values())
    theta = world.upload(state(np.zeros((2, 3)), "0"))
    statistics = world.upload(b"statistics")
    report = world.upload(b'{"base":{"rest":"r","rows":"s"},"statistics":"%s"}' % statistics.digest.encode())
    world.selected(
        layers=[run_pb2.LayerSelection(layer=0, experts=[1, 0])], report=report, initial_state=theta,
        selected_experts=2, total_experts=4, target_parameters=6, model_parameters=100,
    )  # fmt: skip
    version, rolled = 0, list[cycle_pb2.Submission]()
    for number in (1, 2):
        cycle = story(world, spec, number, version, theta)
        cycle.train()
        cycle.commit()
        cycle.submit(rolled)
        rolled = [cycle.late()] if number == 1 else []
        paths = {digest: folder / digest for digest in world.objects}
        for digest, path in paths.items():
            path.write_bytes(world.objects[digest])
        cycle.validate(Artifacts(paths))
        published = cycle.merge(folder)
        version, theta = published.version, published.state
    empty = not progress.merged_anything(world.facts)
    outcome = run_pb2.RUN_OUTCOME_NO_IMPROVEMENT if empty else run_pb2.RUN_OUTCOME_COMPLETED
    world.ended(outcome, final_version=version)
    world.head()
    score = run_pb2.BenchmarkScore(name="exam", metric="loss", items=3, tokens=9, before=2.0, after=1.5)
    measured = run_pb2.BenchmarksMeasured(run=RUN, state=theta.digest, scores=[score])
    if scored == "before":
        world.publish("library", 0, "benchmarked", measured, signer="aggregator")
    deposit(world, folder)
    if scored == "after":
        world.publish("library", 0, "benchmarked", measured, signer="aggregator")
    world.head()
    return world


def deposit(world: World, folder: Path) -> None:
    """The expert, made as the library makes it."""
    from connito.audit.recompute import Recomputation, deposit_again

    paths = {digest: folder / digest for digest in world.objects}
    for digest, path in paths.items():
        path.write_bytes(world.objects[digest])
    bench = Recomputation(world.evidence(), Artifacts(paths), 0.0)
    made = deposit_again(bench)
    if made is None:
        return
    for data in made.files:
        world.upload(data)
    world.publish("library", 0, "deposited", made.message, made.message.expert_id, "library")
