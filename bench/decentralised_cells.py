"""Seeds, rates and cells of `bench.decentralised`, in the order in which they tell most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.merging import ARMS

DOMAINS = ("recipes", "logs", "poems", "ledgers")
# Named before their first run, when all rules stood.
SEEDS = (5101, 5102, 5103, 5104, 5105)
# The same before the gate allowed for chance.
STRICT_SEEDS = (4101, 4102, 4103, 4104, 4105)
# What rates and rules were chosen on.
PILOT_SEEDS = (901, 902, 903, 2101, 2102, 2103, 2104, 2105, 3101, 3102)
STEPS, BATCH, HELD, PER_LAYER, GOAL = 100, 4, 24, 3, 0.98
LOCAL_STEPS, MINERS, LONG = (1, 5, 20, 50), (4, 8, 32), 400
DATA = ("IID", "non-IID")
TARGET = "target"
# Of a miner, by H.
RATES = {1: 2e-3, 5: 8e-3, 20: 8e-3, 50: 8e-3}
# Of central, with what each falls to by a cosine: the two best of twice as many.
SAME = "steps, same rate"
BY_MUON = "steps of Muon"
CENTRAL_RATES = {
    "steps": ((8e-3, 1.0), (1.6e-2, 0.1)),
    "tokens": ((8e-3, 1.0), (8e-3, 0.1)),
    BY_MUON: ((3.2e-2, 1.0), (6.4e-2, 0.1)),
}


STRICT = "default, strict gate"
# Arms beside the default are measured where the miners differ most; robust ones and baselines with four miners.
BESIDE = ("default, unjudged", "default, gainers alone")


@dataclass(frozen=True)
class Cell:
    """One measurement. Central ones have no H (0), and what they share with the miners as their arm."""

    seed: int
    data: str
    miners: int
    steps: int
    arm: str
    # Local steps of a miner.
    total: int = STEPS

    @property
    def name(self) -> str:
        """Return the name by which cells are kept and chosen."""
        long = "" if self.total == STEPS else f"-of_{self.total}"
        return f"{self.seed}-{self.data}-{self.miners}x{self.steps}-{self.arm}{long}".replace(" ", "_").replace(",", "")


def cells(seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield all cells, the most telling ones first."""
    for miners in MINERS:
        for steps in sorted(LOCAL_STEPS, key=lambda h: (h != 20, h)):
            for seed in seeds:
                yield from (Cell(seed, "central", miners, 0, of) for of in CENTRAL_RATES if steps == 20)
                for data in reversed(DATA):
                    yield Cell(seed, data, miners, steps, STRICT if seed in STRICT_SEEDS else "default")
                    if miners == 4 and steps > 1 and seed not in STRICT_SEEDS:
                        yield Cell(seed, data, miners, steps, "default, Muon")
                    if steps == 20 and miners == 4:
                        yield from (Cell(seed, data, miners, steps, arm) for arm in ARMS if arm != "default")
                        continue
                    if steps == 20 or (miners == 4 and data == "non-IID"):
                        yield from (Cell(seed, data, miners, steps, arm) for arm in BESIDE)


def longer(seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield cells with as many merges of long cycles as there are of short ones otherwise."""
    for seed in seeds:
        yield Cell(seed, "central", 4, 0, "steps", LONG)
        yield from (Cell(seed, data, 4, 20, "default", LONG) for data in DATA)
