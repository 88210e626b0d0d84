"""Strategy of a miner: when it acts and how it makes its result. This one is honest; adversaries override its methods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from connito.errors import Invalid
from connito.v1.run_pb2 import TrainPolicy
from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Effort:
    """The effort behind a result. `evaluated`: losses of what the miner held back, in nats per token, the first before any
    step."""

    steps: int
    tokens: int
    seconds: float
    evaluated: tuple[float, ...] = ()


@dataclass(frozen=True)
class Work:
    """One cycle's task: from θ_t in the file `state`, write a result to the file `draft`.

    `train` makes the honest local steps and writes it.
    """

    run: str
    cycle: int
    miner: str
    state: Path
    draft: Path
    policy: TrainPolicy
    train: Callable[[], Awaitable[Effort]]


class Strategy:
    """The honest miner. The predicates are pure functions of the run's facts."""

    name = ""

    def may_produce(self, facts: RunFacts, cycle: int) -> bool:
        """Return whether to make a result now. A cycle whose train window has closed is left to those who were there."""
        return facts.window("train", cycle).opened is not None and facts.window("train", cycle).closed is None

    def may_say_trained(self, facts: RunFacts, cycle: int, *, has_result: bool) -> bool:
        """Return whether to say that the local steps are done."""
        return has_result and facts.window("train", cycle).closed is None

    def may_reveal(self, facts: RunFacts, cycle: int) -> bool:
        """Return whether to upload and reveal a standing commitment. After the window has closed too: it rolls over."""
        return facts.window("submit", cycle).opened is not None

    async def produce(self, work: Work) -> Effort:
        """Write the result to `work.draft`."""
        return await work.train()

    def reveals_after(self, refusal: Invalid) -> bool:
        """Return whether to reveal although the upload was refused."""
        del refusal
        return False


HONEST = Strategy()
