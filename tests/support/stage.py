"""A cycle up to its merge, with three validators and three submissions.

`stage`  nobody has reported yet
`ready`  everyone reported the same and the merge window is open
"""

from __future__ import annotations

from typing import Any, Self

import pytest
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION

from tests.support.run import Run, ref

SEED = b"s" * 32
VALIDATORS = ("VA", "VB", "VC")
MINERS = ("MA", "MB", "MC")


class Stage(Run):
    """`add` a report, `close` the window that waits for them."""

    def __init__(self) -> None:
        super().__init__(name="run-1")
        self.created(
            cycles=2,
            emission=100,
            windows=run_pb2.WindowPolicy(min_validators=2, min_miners=1),
            scoring=run_pb2.ScorePolicy(paid_ranks=2, copy_threshold=0.98),
            merging=run_pb2.MergePolicy(aggregator="mean", outer_learning_rate=1.0),
        )
        self.selected(initial_state=ref("state-0"))
        self.opened("train", 1, (), state=ref("state-0")).closed("train").closed("commit").closed("submit")
        self.settled("submit", 1, submissions=[self.submission(index) for index in range(3)])
        self.drawn(*VALIDATORS, seed=SEED)

    def submission(self, index: int, **changes: Any) -> cycle_pb2.Submission:
        values: dict[str, Any] = {
            "miner": MINERS[index], "artifact": ref(f"artifact-{index}", realm=REALM_SUBMISSION),
            "commit_sequence": index + 1, "reveal_sequence": index + 10, "origin_cycle": 1, "base_state": ref("state-0"),
        }  # fmt: skip
        return cycle_pb2.Submission(**values | changes)

    def report(self, validator: str, utilities: dict[str, float], **changes: Any) -> cycle_pb2.ScoreReport:
        scores = [
            cycle_pb2.SubmissionScore(miner=miner, artifact_digest=f"artifact-{MINERS.index(miner)}", utility=utility)
            for miner, utility in utilities.items()
        ]
        values: dict[str, Any] = {
            "run": self.name, "cycle": 1, "validator": validator, "seed": SEED, "state_digest": "state-0",
            "scores": scores,
        }  # fmt: skip
        return cycle_pb2.ScoreReport(**values | changes)

    def add(self, validator: str, utilities: dict[str, float], **changes: Any) -> None:
        """A report, in place of an earlier one of the same validator."""
        self.put("validate", 1, "report", self.report(validator, utilities, **changes), validator)

    def close(self) -> Self:
        """Close the window at what was reported by now, also when it had been closed before."""
        self.drop("validate", 1, "closed").drop("merge", 1, "opened")
        return self.closed("validate").opened("merge")


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def ready(stage: Stage) -> Stage:
    for validator in VALIDATORS:
        stage.add(validator, {"MA": 0.2, "MB": 0.1, "MC": 0.0})
    return stage.close()
