"""The same tokens in one place and with several miners: how much of the central improvement each way of merging keeps.

Target: all four domains of the tiny base at once. IID: every miner draws from all of them. Non-IID: a miner sees one domain
only. Every miner makes 100 local steps in cycles of H, each merged with the project's own plan, aggregators and outer step.
The arm `default` is a run whose policy says nothing: its merge, read from the policy, and its rules. What does not lower the
loss, each expert taken as far as a merge would, is merged only where the merge is better with it, and a merge that raises the
loss by more than chance gives way to the best submission. `default, strict gate` allows for no chance, as the gate did in
what was measured of the seeds before; so does `default, gainers alone`, which never merges what does not lower the loss.
`default, judged whole` judges submissions as they are, as earlier runs did; in `default, unjudged` and the other arms everybody
is merged, no step is shortened, and there is no gate. `default, Muon` is the default with `training.optimizer: muon`. Central
runs: one with as many steps in a row, each on the batches of all miners together, by AdamW and by Muon, and one with as many
tokens in batches of one miner's size; each the better of a rate that stays and one that falls, chosen with the reported text,
which favours it. `kept` is the fall of the held-out loss over central's fall.

A cell is one seed, data, number of miners, H and arm. It is kept in a file of its own, so a run goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.moe.schedule import Schedule
from connito.moe.training import BETAS
from connito.protocol.claims import claimed_rows, counts_of
from connito.protocol.merging.by_expert import Use, judged
from connito.protocol.merging.gate import Losses, Rule, judge
from connito.protocol.policy.choices import ADAMW, MUON
from connito.workloads.scoring import rebase

from bench.compose_setup import base
from bench.decentralised_cells import (
    BATCH,
    BY_MUON,
    CENTRAL_RATES,
    DOMAINS,
    GOAL,
    HELD,
    PER_LAYER,
    PILOT_SEEDS,
    RATES,
    SAME,
    SEEDS,
    STEPS,
    STRICT_SEEDS,
    TARGET,
    Cell,
    cells,
    longer,
)
from bench.harness import Options, Result, interval, main, note
from bench.local_work import Miner, exchange
from bench.merging import ARMS, DEFAULT, WHOLE, Arm, merged
from bench.plots import RED, axes
from bench.tiny_rig import LENGTH, Rig, Tokens

if TYPE_CHECKING:
    from connito.moe.evaluate import Evaluator
    from connito.moe.selection import Selection
    from torch import nn


def run(options: Options) -> Result:
    """Measure the cells that are not there yet, of those named by `only`, and gather all that are."""
    seeds = PILOT_SEEDS[:1] if options.quick else SEEDS[: options.seeds]
    seeds = PILOT_SEEDS if "pilot" in options.only else seeds
    # Arms are named twice where an old default is one of them.
    wanted = list(dict.fromkeys([*cells(seeds), *longer(seeds), *(cells(STRICT_SEEDS) if seeds == SEEDS else ())]))
    if options.quick:
        wanted = [cell for cell in wanted if cell.miners == 4 and cell.steps in (0, 20) and cell.arm in QUICK]
    folder = options.out / ("decentralised-quick" if options.quick else "decentralised-cells")
    folder.mkdir(parents=True, exist_ok=True)
    benches: dict[int, Bench] = {}
    for cell in wanted:
        path = folder / f"{cell.name}.json"
        if path.exists() or not _named(cell, options.only.replace("pilot", "")):
            continue
        if cell.seed not in benches:
            benches = {cell.seed: Bench(Rig(cell.seed, base(folder, cell.seed)))}
        note(cell.name)
        begun = time.monotonic()
        row = {**asdict(cell), **benches[cell.seed].measure(cell)}
        row["seconds"] = round(time.monotonic() - begun, 1)
        note(f"  gain {row['gain']:.4f}")
        path.write_text(json.dumps(row, indent=2) + "\n")
    names = [folder / f"{cell.name}.json" for cell in wanted]
    return _result(options, [json.loads(path.read_text()) for path in names if path.exists()])


def _named(cell: Cell, only: str) -> bool:
    """Return whether a cell's name begins or ends with one of the words; an empty text names all."""
    return not only.strip() or any(
        cell.name.startswith(f"{word}-") or cell.name.endswith(word) for word in only.split()
    )


QUICK = ("steps", "tokens", "default", "default, gainers alone", "whole, mean")


@dataclass(frozen=True)
class Setting:
    """Domains to learn, experts a layer, and rates: a miner's by H, central's with what each falls to."""

    domains: Sequence[str] = DOMAINS
    per_layer: int = PER_LAYER
    rates: Mapping[int, float] = field(default_factory=lambda: RATES)
    central: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=lambda: CENTRAL_RATES)


class Bench:
    """One seed's base, text and held-out loss."""

    def __init__(self, rig: Rig, setting: Setting = Setting()) -> None:
        import torch
        from connito.moe.evaluate import Evaluator

        torch.set_num_threads(1)
        self.rig, self.setting = rig, setting
        self.selection: Selection = rig.select(setting.domains, setting.per_layer)
        self.evaluator = Evaluator(rig.model(), self.selection)
        held = np.concatenate([rig.held(domain, HELD) for domain in setting.domains])
        # Every other sequence gives the utilities; the other half is reported.
        self.score, self.report = held[::2], held[1::2]

    @cached_property
    def start(self) -> float:
        """Return the loss of the base."""
        return loss_of(self.evaluator, self.evaluator.base, self.report)

    @cached_property
    def model(self) -> nn.Module:
        """Return a training model."""
        from connito.moe.resident import compress

        return compress(self.rig.model(), self.selection, self.selection.helpers)

    @cached_property
    def use(self) -> dict[int, Any]:
        """Return the tokens of the probe that the router sends to each selected expert."""
        from connito.moe.routed import routed_tokens

        self.evaluator.put(self.evaluator.base)
        found = counts_of(
            [routed_tokens(self.evaluator.model, self.selection, self.rig.probe(self.setting.domains, 8))]
        )
        return {layer: counts[0] for layer, counts in found.items()}

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return a cell's gain in nats per token, and the rate it was reached with."""
        if cell.data == "central":
            return self._central(cell)
        arm, rate = ARMS[cell.arm], self.setting.rates[cell.steps] * ARMS[cell.arm].rate
        theta = self._cycles(arm, rate, self._shards(cell.miners, cell.steps, cell.total, iid=cell.data == "IID"))
        return {"rate": rate, "gain": self.start - loss_of(self.evaluator, theta, self.report)}

    def _central(self, cell: Cell) -> dict[str, Any]:
        from connito.moe.resident import write_targets
        from connito.moe.training import train_local

        shards = self._shards(cell.miners, cell.total, cell.total, iid=True)[0]
        together = shards.swapaxes(0, 1)
        batches = together.reshape(cell.total, -1, LENGTH + 1)
        if cell.arm == "tokens":
            batches = together.reshape(-1, BATCH, LENGTH + 1)
        found = []
        for rate, final in self.setting.central[cell.arm]:
            write_targets(self.model, self.evaluator.base)
            schedule = Schedule(1, len(batches), final)
            inner = MUON if cell.arm == BY_MUON else ADAMW
            state, _ = train_local(
                self.model, batches, learning_rate=rate, factor=partial(schedule.factor, 1), inner=inner
            )
            gain = self.start - loss_of(self.evaluator, state, self.report)
            found.append({"rate": rate, "final_rate_share": final, "gain": gain})
        return max(found, key=lambda row: row["gain"]) | {"tried": found}

    def _shards(self, miners: int, steps: int, total: int, *, iid: bool) -> Tokens:
        return shards_of(self.rig, miners, steps, total, iid=iid, domains=self.setting.domains)

    def _cycles(self, arm: Arm, rate: float, shards: Tokens) -> Any:
        """Return the state after all cycles of shards [cycles, miners, H, B, L + 1]."""
        from connito.moe.moments import Moments
        from connito.moe.resident import write_targets
        from connito.moe.routed import routed_tokens

        def kept() -> Moments | None:
            return None if arm.moments == "fresh" else Moments(second_only=arm.moments == "second")

        miners = [Miner(arm.work, kept(), (arm.beta1, BETAS[1])) for _ in range(shards.shape[1])]
        use = self.use if arm.by_expert else {}
        theta, outer = {name: rows.numpy() for name, rows in self.evaluator.base.items()}, None
        best = incumbent = self.losses(self.evaluator.base)
        for cycle in shards:
            start, routed = tensors(theta), []
            for batches in cycle if arm.merge.weighting != WHOLE else ():
                write_targets(self.model, start)
                routed.append(routed_tokens(self.model, self.selection, claimed_rows(batches)))
            states = [miner.work(self.model, start, own, rate) for miner, own in zip(miners, cycle, strict=True)]
            exchange(miners)
            utilities = [1.0] * len(states)
            before = 0.0
            measured = _as_judged(start, states, routed, use)
            if arm.merge.counts_utilities or arm.judged:
                before = loss_of(self.evaluator, start, self.score)
                utilities = [before - loss_of(self.evaluator, state, self.score) for state in measured]
            everyone = list(range(len(states)))
            gainers = [i for i in everyone if utilities[i] > 0 or not arm.judged]
            groups = [gainers] if not arm.gainless or len(gainers) == len(everyone) else [gainers, everyone]
            made = [
                merged(
                    arm.merge,
                    theta,
                    outer,
                    [states[i] for i in group],
                    [max(1e-9, utilities[i]) for i in group],
                    [routed[i] for i in group if routed],
                    [miners[i].moments for i in group],
                    use,
                )
                for group in groups
                if group
            ]
            if arm.judged:
                rule = Rule(TARGET, 0.0, arm.margin, best=best)
                alone = measured[int(np.argmax(utilities))] if gainers else None
                made, incumbent = self._gated(theta, made, alone, incumbent, rule)
                best = min(best, incumbent, key=lambda losses: losses.per_token()[TARGET])
            if made:
                theta, outer = made[0]
        return tensors(theta)

    def losses(self, state: Any, table: Tokens | None = None) -> Losses:
        """Return a state's losses by sequence, on what gives the utilities where nothing else is named."""
        sums, counts = self.evaluator.losses(state, self.score if table is None else table)
        rows = (tuple(map(float, sums)), tuple(map(int, counts)))
        return Losses({TARGET: (math.fsum(sums), int(counts.sum()))}, {TARGET: rows})

    def _gated(
        self, theta: Any, made: list[Any], alone: Any, incumbent: Losses, rule: Rule
    ) -> tuple[list[Any], Losses]:
        """Return what the gate lets through, and its losses: the better merge, else the best submission as it was measured, else
        nothing.
        """
        tried = [self.losses(tensors(state)) for state, _ in made]
        passed = [place for place in range(len(made)) if judge(incumbent, tried[place], rule) is None]
        if passed:
            best = min(passed, key=lambda place: tried[place].per_token()[TARGET])
            return [made[best]], tried[best]
        if alone is None or judge(incumbent, after := self.losses(alone), rule) is not None:
            return [], incumbent
        state = {name: rows.numpy() for name, rows in alone.items()}
        return [(state, {name: theta[name] - rows for name, rows in state.items()})], after


def _as_judged(theta: Any, states: Sequence[Any], routed: Sequence[dict[int, list[int]]], use: Use) -> Sequence[Any]:
    """Return states of which each expert counts as a run judges it."""
    strength = judged(routed, use) if routed else {}
    return [
        rebase(state, theta, theta, {layer: rows[place] for layer, rows in strength.items()})
        for place, state in enumerate(states)
    ]


def shards_of(
    rig: Rig,
    miners: int,
    steps: int,
    total: int = STEPS,
    *,
    iid: bool,
    batch: int = BATCH,
    domains: Sequence[str] = DOMAINS,
) -> Tokens:
    """Return [cycles, miners, H, B, L + 1]; both arrangements hold exactly the same sequences."""
    each = total * batch
    by_domain = [rig.train(domain, each * miners // len(domains)) for domain in domains]
    pool = np.concatenate(by_domain)  # miners // 4 blocks of `each` sequences per domain
    if iid:
        pool = pool[np.random.default_rng(rig.seed).permutation(len(pool))]
    return pool.reshape(miners, total // steps, steps, batch, pool.shape[-1]).swapaxes(0, 1)


def tensors(theta: dict[str, Any]) -> dict[str, Any]:
    """Return arrays as tensors."""
    import torch

    return {name: torch.from_numpy(rows) for name, rows in theta.items()}


def loss_of(evaluator: Evaluator, state: Any, table: Tokens) -> float:
    """Return nats per token."""
    sums, counts = evaluator.losses(state, table)
    return float(sums.sum() / counts.sum())


def _result(options: Options, rows: list[dict[str, Any]]) -> Result:
    central = central_of(rows)
    figures = kept_of(rows, central)
    ends = (", default, equal steps", ", default, unjudged, equal steps")
    bars = {
        key.removesuffix(", equal steps").replace(", default", ""): tuple(value[:3])
        for key, value in figures.items()
        if key.endswith(ends)
    }
    figures |= _beside_default(rows, central)
    with axes(options.out / "decentralised.svg", 1) as (share,):
        share.bars(bars, "share of the central improvement kept at equal steps, default merge")
        share.upright(GOAL, RED)
    settings = {
        # So that as much is run again, and no more.
        "only": " ".join(Cell(**{key: row[key] for key in Cell.__annotations__ if key in row}).name for row in rows),
        "steps": STEPS,
        "batch_sequences": BATCH,
        "sequence_length": LENGTH,
        "miner_rates": {str(steps): rate for steps, rate in RATES.items()},
        "central_rates": CENTRAL_RATES,
        "experts_selected": f"{PER_LAYER} of 8 in each of 2 layers",
        "seeds_reported": SEEDS,
        "seeds_by_the_strict_gate": STRICT_SEEDS,
        "seeds_tuned_on": PILOT_SEEDS,
        "held_out_sequences": HELD * len(DOMAINS) // 2,
        "default": asdict(DEFAULT),
        "goal": GOAL,
        "torch_threads": 1,
    }
    return Result(settings, rows, figures)


def central_of(rows: list[dict[str, Any]]) -> dict[Any, float]:
    """Return central's gain by seed, miners, steps and what it shares with the miners."""
    found = {(*_whose(r), r["arm"]): r["gain"] for r in rows if r["data"] == "central"}
    # The first that is tried has the miners' rate, and stays.
    return found | {
        (*_whose(r), SAME): r["tried"][0]["gain"] for r in rows if (r["data"], r["arm"]) == ("central", "steps")
    }


def kept_of(rows: list[dict[str, Any]], central: Mapping[Any, float]) -> dict[str, Any]:
    """Return by arm and central run the share of central's gain that is kept: [mean, low, high, seeds]."""
    figures: dict[str, Any] = {}
    for key, found in _groups(rows).items():
        for against in (*CENTRAL_RATES, SAME):
            kept = [r["gain"] / central[of] for r in found if (of := (*_whose(r), against)) in central]
            if kept:
                figures[f"{key}, equal {against}"] = [round(value, 4) for value in interval(kept)] + [len(kept)]
    return figures


def _beside_default(rows: list[dict[str, Any]], central: dict[Any, float]) -> dict[str, Any]:
    """Return what the default gains over other arms in the same seed, as a share of central at equal steps."""
    rows = [row for row in rows if row.get("total", STEPS) == STEPS]
    gains = {(r["data"], r["miners"], r["steps"], r["seed"]): r["gain"] for r in rows if r["arm"] == "default"}
    found: dict[str, list[float]] = {}
    for row in rows:
        place, base = (row["data"], row["miners"], row["steps"], row["seed"]), (*_whose(row), "steps")
        if row["arm"] not in ("default", *CENTRAL_RATES) and place in gains and base in central:
            name = f"default over {row['arm']}: {row['data']}, {row['miners']} miners, H {row['steps']}"
            found.setdefault(name, []).append((gains[place] - row["gain"]) / central[base])
    return {name: [*(round(value, 4) for value in interval(values)), len(values)] for name, values in found.items()}


def _groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["data"] != "central":
            long = "" if row.get("total", STEPS) == STEPS else f", {row['total']} steps a miner"
            found.setdefault(f"{row['data']}, {row['miners']} miners, H {row['steps']}{long}, {row['arm']}", []).append(
                row
            )
    return found


def _whose(row: dict[str, Any]) -> tuple[int, int, int]:
    """Return which central run a row is compared with."""
    return row["seed"], row["miners"], row.get("total", STEPS)


if __name__ == "__main__":
    main("decentralised", run, doc=__doc__, seeds=len(SEEDS))
