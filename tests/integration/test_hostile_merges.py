"""With f of n merged submissions malicious, what is published never loses more than the gate allows: real model, real gate.

Every validator is made to lie, so that the malicious ones reach the merge with the highest utilities of all. Then only
the aggregator and the gate stand between them and the next version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.protocol.policy.choices import AGGREGATORS
from connito.v1 import cycle_pb2, reasons_pb2

from bench.attack_arena import GENERAL, TARGET, Arena, MergedCycle, Standing, Upload
from bench.tiny_rig import Rig
from tests.integration.tiny_run import tiny_base

pytestmark = pytest.mark.integration

State = dict[str, Any]
Harm = Callable[["Stage", int], State]


class Stage:
    """Four honest submissions to θ_0, and whatever stands beside them."""

    def __init__(self, folder: Path) -> None:
        from connito.moe.state import load_state

        self.arena = Arena(Rig(3, tiny_base()), "IID", folder)
        self.standing = self.arena.start()
        self.theta = load_state(self.standing.state)
        self.honest = self.arena.honest(self.standing, 1)
        self._written = 0
        self._harmful: dict[tuple[str, int], State] = {}

    def upload(self, name: str, state: State) -> Upload:
        from connito.moe.state import save_state

        self._written += 1
        path = self.arena.folder / f"upload-{self._written}"
        save_state(state, path)
        return Upload(name, path)

    def play(self, harm: Harm, faulty: int, **merging: Any) -> MergedCycle:
        """`faulty` malicious submissions, all of which every validator praises."""
        for name, value in merging.items():
            setattr(self.arena.spec.merging, name, value)
        uploads = [self.upload(f"honest-{i}", state) for i, state in enumerate(self.honest)]
        uploads += [self.upload(f"evil-{i}", self.harmful(harm, i)) for i in range(faulty)]
        played = self.arena.play(1, self.standing, uploads, 3, dict.fromkeys(range(3), praise))
        assert not [miner for miner in played.refused if miner.startswith("honest")]
        return played

    def harmful(self, harm: Harm, index: int) -> State:
        """Made once."""
        key = (harm.__name__, index)
        if key not in self._harmful:
            self._harmful[key] = harm(self, index)
        return self._harmful[key]

    def moved(self, change: Callable[[str, Any], Any]) -> State:
        return {name: rows + change(name, rows) for name, rows in self.theta.items()}


def praise(report: cycle_pb2.ScoreReport) -> None:
    for score in report.scores:
        score.utility, score.reason = (9.0 if score.miner.startswith("evil") else 0.1), reasons_pb2.REASON_UNSPECIFIED
        del score.losses[:]  # nothing to compare effects by, either


def flipped(stage: Stage, index: int) -> State:
    one = stage.honest[index % 4]
    return stage.moved(lambda name, rows: 4.0 * (rows - one[name]) + 0.01 * noise(index, name, rows))


def random(stage: Stage, index: int) -> State:
    return stage.moved(lambda name, rows: 0.2 * rows.norm() / rows.numel() ** 0.5 * noise(index, name, rows))


def far(stage: Stage, index: int) -> State:
    one = stage.honest[index % 4]
    return stage.moved(lambda name, rows: 9.0 * (one[name] - rows) + 0.02 * noise(index, name, rows))


def broken_general(stage: Stage, index: int) -> State:
    from bench.compose_setup import text
    from bench.tiny_rig import LENGTH, batched

    general = np.concatenate([text(domain, 32, 60_000 + index, LENGTH) for domain in GENERAL])
    return stage.arena.sabotage(stage.standing.state, stage.arena.shard(4 + index, 1, 12), batched(general, 4))


def noise(index: int, name: str, rows: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1000 * index + sum(name.encode()))
    return torch.randn(rows.shape, generator=generator)


HARMS: tuple[Harm, ...] = (flipped, random, far, broken_general)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Stage(tmp_path_factory.mktemp("merges"))
    torch.set_num_threads(threads)


def rises(losses: Any) -> dict[str, float]:
    return {loss.domain: loss.after - loss.before for loss in losses}


@pytest.mark.parametrize("aggregator", ["mean", "utility-mean", "coordinate-median", "krum"])
@pytest.mark.parametrize("harm", HARMS)
def test_published_loss_stays_within_the_gates_margin(stage: Stage, harm: Harm, aggregator: str) -> None:
    assert aggregator in AGGREGATORS
    margin = stage.arena.spec.merging.gate_general_margin
    for faulty in (1, 3) if aggregator == "utility-mean" else (3,):
        played = stage.play(harm, faulty, aggregator=aggregator)
        version = played.merged.version
        gate, report = rises(version.gate_losses or version.losses), rises(version.losses)
        assert gate[TARGET] <= 0.0
        assert max(gate[domain] for domain in GENERAL) <= margin
        # On text that decided nothing it holds up to what a sample of sixteen sequences can be off.
        assert max(report.values()) <= margin


def test_without_the_gate_they_would_have_done_harm(stage: Stage) -> None:
    """The same submissions, averaged: what the margin is there for."""
    clean = stage.arena.naive(stage.standing, [stage.upload("a", state) for state in stage.honest])
    for harm, domain in ((flipped, 0), (far, 0), (broken_general, 1)):
        evil = [stage.upload("b", stage.harmful(harm, i)) for i in range(3)]
        # What breaks general text is diluted by honest work, so it is looked at alone.
        honest = [] if domain else [stage.upload("a", state) for state in stage.honest]
        assert stage.arena.naive(stage.standing, [*honest, *evil])[domain] > clean[domain] + 0.03, harm.__name__


def test_the_incumbent_stays_when_only_malice_is_left(stage: Stage) -> None:
    uploads = [stage.upload(f"evil-{i}", stage.harmful(flipped, i)) for i in range(3)]
    played = stage.arena.play(1, Standing(stage.standing.state), uploads, 3, dict.fromkeys(range(3), praise))
    assert played.merged.version.gate == cycle_pb2.GATE_DECISION_KEPT_INCUMBENT
    assert played.merged.state == stage.standing.state
