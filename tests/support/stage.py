"""A cycle up to its merge, as facts, with three validators and three submissions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from connito.v1 import artifacts_pb2, cycle_pb2, run_pb2
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import FactKey
from google.protobuf.message import Message

RUN = "run-1"
SEED = b"s" * 32
VALIDATORS = ("VA", "VB", "VC")
MINERS = ("MA", "MB", "MC")


def ref(digest: str) -> artifacts_pb2.ArtifactRef:
    return artifacts_pb2.ArtifactRef(digest=digest, size=10, media_type="x", realm=artifacts_pb2.REALM_SUBMISSION)


def submission(index: int, **changes: object) -> cycle_pb2.Submission:
    values: dict[str, object] = {
        "miner": MINERS[index],
        "artifact": ref(f"artifact-{index}"),
        "commit_sequence": index + 1,
        "reveal_sequence": index + 10,
        "origin_cycle": 1,
        "base_state": ref("state-0"),
    }
    return cycle_pb2.Submission(**{**values, **changes})


def report(validator: str, utilities: dict[str, float], **changes: object) -> cycle_pb2.ScoreReport:
    scores = [
        cycle_pb2.SubmissionScore(miner=miner, artifact_digest=f"artifact-{MINERS.index(miner)}", utility=utility)
        for miner, utility in utilities.items()
    ]
    values: dict[str, object] = {
        "run": RUN, "cycle": 1, "validator": validator, "seed": SEED, "state_digest": "state-0", "scores": scores,
    }  # fmt: skip
    return cycle_pb2.ScoreReport(**{**values, **changes})


@dataclass
class World:
    """Facts by key, each with a sequence of its own per stream; `facts()` builds the projection."""

    entries: dict[FactKey, tuple[Message, str, int]] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)

    def put(self, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> int:
        stream = "RUNS" if section == "run" else section.upper()
        self.sequences[stream] = self.sequences.get(stream, 0) + 1
        self.entries[FactKey(section, cycle, kind, id_)] = (message, stream, self.sequences[stream])
        return self.sequences[stream]

    def drop(self, section: str, cycle: int, kind: str, id_: str = "") -> None:
        del self.entries[FactKey(section, cycle, kind, id_)]

    def facts(self) -> RunFacts:
        facts = RunFacts(RUN)
        for key, (message, stream, sequence) in self.entries.items():
            facts.add(Fact(RUN, key, message, "UX", stream, sequence, 0))
        return facts


def start() -> World:
    world = World()
    spec = run_pb2.RunSpec(
        run=RUN,
        domain="medical",
        cycles=2,
        emission=100,
        windows=run_pb2.WindowPolicy(min_validators=2, min_miners=1),
        scoring=run_pb2.ScorePolicy(paid_ranks=2, copy_threshold=0.98),
        merging=run_pb2.MergePolicy(aggregator="mean", outer_learning_rate=1.0),
    )
    world.put("run", 0, "created", run_pb2.RunCreated(spec=spec))
    world.put("run", 0, "selected", run_pb2.SelectionMade(run=RUN, initial_state=ref("state-0")))
    opened = cycle_pb2.WindowOpened(run=RUN, cycle=1, version=0, state=ref("state-0"))
    world.put("train", 1, "opened", opened)
    settled = cycle_pb2.WindowSettled(run=RUN, cycle=1, submissions=[submission(index) for index in range(3)])
    world.put("submit", 1, "settled", settled)
    world.put("validate", 1, "drawn", cycle_pb2.SeedDrawn(run=RUN, cycle=1, seed=SEED, validators=VALIDATORS))
    return world


def close(world: World) -> None:
    last = world.sequences["VALIDATE"]
    world.put("validate", 1, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=1, stream="VALIDATE", last_sequence=last))
    world.put("merge", 1, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=1))


@dataclass
class Stage:
    """What the tests of this folder need by name."""

    world: World
    report: Callable[..., cycle_pb2.ScoreReport] = report
    submission: Callable[..., cycle_pb2.Submission] = submission

    def add(self, validator: str, utilities: dict[str, float], **changes: object) -> None:
        self.world.put("validate", 1, "report", report(validator, utilities, **changes), validator)

    def close(self) -> None:
        close(self.world)


@pytest.fixture
def stage() -> Stage:
    return Stage(start())


@pytest.fixture
def ready(stage: Stage) -> Stage:
    """Everyone reported the same and the merge window is open."""
    for validator in VALIDATORS:
        stage.add(validator, {"MA": 0.2, "MB": 0.1, "MC": 0.0})
    stage.close()
    return stage
