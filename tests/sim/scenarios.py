"""What happens to simulated runs: storms that follow from a seed, and the faults that were once found, each by its name."""

from __future__ import annotations

from random import Random

from tests.sim.broker import Weather
from tests.sim.world import FAULTS, Scenario


def storm_of(seed: int) -> Scenario:
    """Return a storm of some kinds of faults: a storm of every kind at once seldom lets a run come far enough."""
    rng = Random(f"storm {seed}")
    kinds = tuple(sorted(rng.sample(sorted(FAULTS), rng.randint(1, 5))))
    weather = Weather(
        slow=rng.choice([0.0, 0.0, 0.02]), lost_ack=rng.choice([0.0, 0.0, 0.05]),
        lost_hint=rng.choice([0.0, 0.1]), forget_id=rng.choice([0.0, 0.3]), behind=rng.choice([0.0, 0.2]),
    )  # fmt: skip
    return Scenario(
        storm=kinds, every=rng.choice([0.4, 0.8, 1.5]), seconds=rng.uniform(5, 20),
        skew=rng.choice([0.0, 0.0, 1800.0]), weather=weather,
    )  # fmt: skip
