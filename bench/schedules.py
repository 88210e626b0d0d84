"""Warm-up and decay of the miners' learning rate over a run: which loss a run ends with, at several rates.

The rig of `bench.decentralised` (four miners, IID, Nesterov outer step, the policy's moments and β₁, no gate), in two shapes of
run: the short one has few cycles of more steps. The arms are a rate that stays, one that rises over the run's first tenth, one
that falls by a cosine to a tenth, and both. Nobody knows the best rate of a run beforehand, so each arm is
measured at half, once and twice the rate that the constant arm was tuned to. `gain` is the fall of the held-out loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from connito.moe.schedule import Schedule
from connito.protocol.claims import claimed_rows

from bench.decentralised import loss_of, shards_of, tensors
from bench.decentralised_cells import DOMAINS, PER_LAYER
from bench.harness import Options, Result, main, note
from bench.merging import BETA1, MOMENTS, Merge, merged
from bench.tiny_rig import Rig, rig_settings, rigs, spread


@dataclass(frozen=True)
class Scale:
    """Cycles of H local steps, of so many miners, with so many sequences a step."""

    cycles: int
    steps: int
    miners: int = 4
    batch: int = 8


HELD, RATE = 12, 8e-3
SHAPES = {"4 cycles of 10": Scale(4, 10), "20 cycles of 5": Scale(20, 5)}
RATES = (RATE / 2, RATE, RATE * 2)
# Share of the run in which the rate rises, and what it falls to.
ARMS = {"constant": (0.0, 1.0), "warm-up": (0.1, 1.0), "decay": (0.0, 0.1), "both": (0.1, 0.1)}
QUICK_SEEDS = 1


@dataclass(frozen=True)
class Arm:
    """One measurement: the shape of the run, its schedule and its rate."""

    shape: str
    name: str
    rate: float

    def factor(self, cycle: int, step: int) -> float:
        """Return the factor on the rate at a local step (from 0) of a cycle (from 1)."""
        scale, (rise, final) = SHAPES[self.shape], ARMS[self.name]
        place, rising = (cycle - 1) * scale.steps + step, round(rise * scale.cycles * scale.steps)
        return Schedule(scale.cycles, scale.steps, final).factor(cycle, step) * min(1.0, (place + 1) / (rising + 1))


def run(options: Options) -> Result:
    """Run every arm of every shape; a quick run has the short shape at one rate."""
    shapes, rates = (list(SHAPES)[:1], RATES[1:2]) if options.quick else (list(SHAPES), RATES)
    arms = [Arm(shape, name, rate) for shape in shapes for name in ARMS for rate in rates]
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS) as each:
        for rig in each:
            rows += [_measure(rig, arm) for arm in arms]
    figures: dict[str, Any] = {}
    for arm in arms:
        gains = [
            row["gain"]
            for row in rows
            if (row["shape"], row["schedule"], row["rate"]) == (arm.shape, arm.name, arm.rate)
        ]
        figures[f"{arm.shape}, rate {arm.rate:g}, {arm.name}"] = spread(gains)
    figures |= _beside_constant(rows)
    settings = {"rates": rates, "arms": ARMS, "moments": MOMENTS, "beta1": BETA1, **rig_settings(options, QUICK_SEEDS)}
    return Result(settings, rows, figures)


def _beside_constant(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by shape and arm, the gain over the constant rate's in the same seed and at the same rate."""
    base = {(row["shape"], row["rate"], row["seed"]): row["gain"] for row in rows if row["schedule"] == "constant"}
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["schedule"] != "constant":
            ratio = row["gain"] / base[row["shape"], row["rate"], row["seed"]]
            found.setdefault(f"{row['schedule']} over constant, {row['shape']}, all rates", []).append(ratio)
    return {name: spread(values) for name, values in found.items()}


def _measure(rig: Rig, arm: Arm) -> dict[str, Any]:
    from connito.moe.evaluate import Evaluator
    from connito.moe.moments import Moments
    from connito.moe.resident import compress, write_targets
    from connito.moe.routed import routed_tokens
    from connito.moe.training import BETAS, train_local

    scale = SHAPES[arm.shape]
    selection = rig.select(DOMAINS, PER_LAYER)
    evaluator = Evaluator(rig.model(), selection)
    held = np.concatenate([rig.held(domain, HELD) for domain in DOMAINS])
    model = compress(rig.model(), selection, selection.helpers)
    moments = [Moments(second_only=MOMENTS == "second") for _ in range(scale.miners)]
    theta: Any = {name: rows.clone() for name, rows in evaluator.base.items()}
    outer, start = None, loss_of(evaluator, theta, held)
    total = scale.cycles * scale.steps
    given = shards_of(rig, scale.miners, scale.steps, iid=True, total=total, batch=scale.batch)
    for cycle, shards in enumerate(given, start=1):
        states, routed = [], []
        for batches, kept in zip(shards, moments, strict=True):
            write_targets(model, theta)
            routed.append(routed_tokens(model, selection, claimed_rows(batches)))
            states.append(
                train_local(
                    model,
                    batches,
                    learning_rate=arm.rate,
                    moments=kept,
                    betas=(BETA1, BETAS[1]),
                    factor=partial(arm.factor, cycle),
                )[0]
            )
        plain = {name: rows.numpy() for name, rows in theta.items()}
        stepped, outer = merged(Merge.default(), plain, outer, states, [1.0] * len(states), routed)
        theta = tensors(stepped)
    gain = start - loss_of(evaluator, theta, held)
    note(f"seed {rig.seed}: {arm.shape}, {arm.name}, rate {arm.rate:g}: {gain:.4f}")
    return {"seed": rig.seed, "shape": arm.shape, "schedule": arm.name, "rate": arm.rate, "gain": gain}


if __name__ == "__main__":
    main("schedules", run, doc=__doc__, seeds=3)
