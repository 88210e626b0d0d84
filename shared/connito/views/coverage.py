"""Words for how much of a customer's text a run trains on."""

from __future__ import annotations

from dataclasses import dataclass

from connito.protocol.progress import training
from connito.protocol.sequences import miners_of
from connito.render import formats
from connito.v1.run_pb2 import RunSpec, TrainPolicy
from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Coverage:
    """Tokens of the customer's own text that were given to miners, and those that there are; `there` is 0 where unknown."""

    read: int
    there: int

    @property
    def share(self) -> float:
        """Return the share of the text that was read at least once: a text is read whole before anything is read again."""
        return min(1.0, self.read / self.there) if self.there else 0.0

    def __str__(self) -> str:
        if not self.there:
            return f"{self.read:,} tokens"
        times = f", {self.read / self.there:.1f} times over" if self.read > 1.5 * self.there else ""
        return f"{self.read:,} of {self.there:,} tokens ({formats.percent(self.share)} of the training text{times})"


def planned(spec: RunSpec, miners: int, cycles: int, tokens: int = 0) -> Coverage:
    """Return what so many miners read in so many cycles; `tokens`: of the training text, by default as the spec says."""
    return Coverage(miners * cycles * _own(spec.training), tokens or spec.train.tokens)


def covered(facts: RunFacts) -> Coverage:
    """Return what the miners of a run were given in the cycles that have a version."""
    read = sum(len(miners_of(facts, cycle)) * _own(training(facts, cycle)) for cycle in facts.versions)
    return Coverage(read, facts.require_spec().train.tokens)


def _own(policy: TrainPolicy) -> int:
    """Return the tokens of one miner's cycle that are not replay."""
    rows = policy.local_steps * policy.batch_sequences
    return (rows - int(rows * policy.replay_share + 1e-9)) * policy.sequence_length
