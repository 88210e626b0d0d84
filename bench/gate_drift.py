"""Merges that harm on purpose against the gate, cycle by cycle: the worst case, in which nothing else holds them back.

The attacker makes the candidate as it likes, has the gate's own text and the rule, and takes in each of 24 cycles the
furthest step that passes. The target is all four domains of the tiny base, after honest training.

kinds      the opposite of honest work on the gate's text; the opposite of work on one of its sequences; noise; and noise whose
           spread is to pass for chance, with the opposite of honest work under it
strict     a rise is refused
forgetful  a rise beyond chance is refused, against the incumbent alone
landed     beyond chance or the default margin, against the incumbent and the best version so far
gate, report   how far the loss came to lie above the first version's, on the gate's text and on text that decides nothing
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from connito.protocol.merging.gate import Losses, Rule, judge
from connito.protocol.policy.law import DEFAULTS

from bench.compose_setup import base
from bench.decentralised import Bench, shards_of
from bench.decentralised_cells import TARGET
from bench.harness import Options, Result, main, note
from bench.tiny_rig import Rig, batched, spread

# Named before their first run.
SEEDS = (6101, 6102, 6103)
CYCLES, HONEST_STEPS, RATE = 24, 60, 8e-3
MARGIN = DEFAULTS.merging.gate_target_margin
RULES = ("strict", "forgetful", "landed")
KINDS = ("against honest work", "against one sequence", "noise", "harm under noise")
# Lengths that are tried, of an honest step of ten.
LENGTHS = tuple(2.0**-n for n in range(-1, 7))
# So much that no rise is refused for its size alone.
NO_LIMIT = 1e9

State = dict[str, Any]


def run(options: Options) -> Result:
    """Attack every rule in every way, on one base a seed."""
    import torch

    torch.set_num_threads(1)
    seeds, rows = SEEDS[: 1 if options.quick else options.seeds], []
    cycles, kinds = (4, KINDS[:1]) if options.quick else (CYCLES, KINDS)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            attack = Attack(seed, Path(folder))
            for kind in kinds:
                for rule in RULES:
                    note(f"{seed}: {kind}, {rule}")
                    rows.append({"seed": seed, "kind": kind, "rule": rule, **attack.measure(kind, rule, cycles)})
    figures = {
        f"{kind}, {rule}: {part}": spread([max(r[part]) for r in rows if (r["kind"], r["rule"]) == (kind, rule)])
        for kind in kinds
        for rule in RULES
        for part in ("gate", "report")
    }
    settings = {"cycles": cycles, "margin": MARGIN, "seeds_named": seeds, "sequences": len(attack.bench.score)}
    return Result({**settings, "torch_threads": 1}, rows, figures)


class Attack:
    """A state after honest work, and ways to spoil it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.bench = Bench(Rig(seed, base(folder, seed)))
        shards = shards_of(self.bench.rig, 4, HONEST_STEPS, HONEST_STEPS, iid=True)[0, 0]
        self.start = self._trained(self.bench.evaluator.base, shards)
        self._rng = np.random.default_rng(seed)

    def measure(self, kind: str, rule: str, cycles: int) -> dict[str, Any]:
        """Return by how much the losses lie above the first ones after each cycle, in nats per token."""
        self._rng = np.random.default_rng([self.bench.rig.seed, KINDS.index(kind)])
        state, incumbent = self.start, self.bench.losses(self.start)
        first, best, reported = incumbent, incumbent, self._report(state)
        gate, report = [], []
        for _ in range(cycles):
            held = Rule(
                TARGET,
                0.0,
                {"strict": 0.0, "forgetful": NO_LIMIT, "landed": MARGIN}[rule],
                best=best if rule == "landed" else None,
            )
            state, incumbent = self._furthest(kind, state, incumbent, held)
            best = min(best, incumbent, key=lambda losses: losses.per_token()[TARGET])
            gate.append(incumbent.per_token()[TARGET] - first.per_token()[TARGET])
            report.append(self._report(state) - reported)
        return {"gate": gate, "report": report}

    def _furthest(self, kind: str, state: State, incumbent: Losses, rule: Rule) -> tuple[State, Losses]:
        """Return the worst state that passes, and its losses; the incumbent where none does."""
        found, at = state, incumbent
        for direction in self._directions(kind, state):
            for length in LENGTHS:
                tried = {name: rows + length * direction[name] for name, rows in state.items()}
                losses = self.bench.losses(tried)
                worse = losses.per_token()[TARGET] > at.per_token()[TARGET]
                if worse and judge(incumbent, losses, rule) is None:
                    found, at = tried, losses
                    break
        return found, at

    def _directions(self, kind: str, state: State) -> list[State]:
        text = self.bench.score[:1].repeat(40, axis=0) if kind == "against one sequence" else self._drawn()
        work = {name: rows - state[name] for name, rows in self._trained(state, batched(text, 4)).items()}
        length = math.sqrt(sum(float((rows**2).sum()) for rows in work.values()))
        harm = {name: -rows for name, rows in work.items()}
        if kind.startswith("against"):
            return [harm]
        made = []
        for _ in range(2):
            noise = {name: self._noise(rows) for name, rows in state.items()}
            scale = length / math.sqrt(sum(float((rows**2).sum()) for rows in noise.values()))
            under = {"noise": 0.0, "harm under noise": 0.5}[kind]
            made.append({name: scale * rows + under * harm[name] for name, rows in noise.items()})
        return made

    def _drawn(self) -> Any:
        return self.bench.score[self._rng.permutation(len(self.bench.score))[:40]]

    def _noise(self, rows: Any) -> Any:
        import torch

        return torch.from_numpy(self._rng.standard_normal(tuple(rows.shape)).astype(np.float32))

    def _trained(self, state: State, batches: Any) -> State:
        from connito.moe.resident import write_targets
        from connito.moe.training import train_local

        write_targets(self.bench.model, state)
        found, _ = train_local(self.bench.model, batches, learning_rate=RATE)
        return {name: rows.detach().clone() for name, rows in found.items()}

    def _report(self, state: State) -> float:
        return self.bench.losses(state, self.bench.report).per_token()[TARGET]


if __name__ == "__main__":
    main("gate_drift", run, doc=__doc__, seeds=len(SEEDS))
