"""Attacks on merges that judge by expert and try work that gains nothing alone: what they earn, and what they do to the model.

Four honest miners of one of two domains each, on a base whose experts differ, one cycle of 8 or 1 local steps. Attackers
commit last and know all that the others made; what they claim of their tokens is taken as true, so that the merge and its
gate are all that holds them back. A row is compared with the same cycle without them.

found      attackers' hand-ins that were refused, by whatever reason
merged     attackers' hand-ins that the published version holds
earned     what attackers got together, an honest miner of the same cycle being 1
rise       of the published target loss by the attack, nats per token; general: of the general domains
gained     fall of the published target loss by the cycle
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.protocol.claims import Claim, claimed_rows, metadata_of
from connito.protocol.policy import choices
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.enums import plain_name, reason_name

from bench.attack_arena import GENERAL, HONEST, RUN, TARGET, Arena, MergedCycle, Standing, Upload
from bench.compose_setup import text
from bench.harness import Options, Result, main, note
from bench.tiny_rig import LENGTH, Tokens, batched, rig_settings, rigs, spread
from bench.work_kinds import delta, noise, norm, plus

if TYPE_CHECKING:
    from bench.work_kinds import State

QUICK_SEEDS = 1
# With one step a cycle hardly anybody gains anything alone.
STEPS = (8, 1)


@dataclass
class ByExpert(Arena):
    """An arena whose run merges by tokens, expert by expert, and whose selection says what the target uses."""

    steps: int = 8

    def policy(self) -> run_pb2.RunSpec:
        """Return the policy, merging by tokens."""
        spec = super().policy()
        # Aggregators that weigh by utility have no merge with what gained nothing.
        spec.merging.weighting, spec.merging.aggregator = choices.TOKENS, "mean"
        spec.training.local_steps = self.steps
        return spec

    @cached_property
    def selected(self) -> run_pb2.SelectionMade:
        """Return the selection with the share of the probe's tokens that each expert has."""
        made, counted = run_pb2.SelectionMade(run=RUN), self.count(self.rig.probe(self.domains, 8))
        for layer, experts in sorted(self.selection.layers.items()):
            shares = [float(n) for n in counted[layer]]
            made.layers.append(run_pb2.LayerSelection(layer=layer, experts=experts, use=shares))
        return made

    def count(self, rows: Tokens) -> dict[int, list[int]]:
        """Return tokens of rows by selected expert, on the base."""
        from connito.moe.resident import write_targets
        from connito.moe.routed import routed_tokens
        from connito.moe.state import load_state

        write_targets(self._training_model, load_state(self.start().state))
        return routed_tokens(self._training_model, self.selection, rows)

    def claim(self, miner: int) -> dict[int, list[int]]:
        """Return a miner's true claim in the first cycle."""
        return self.count(claimed_rows(self.shard(miner, 1)))


@dataclass(frozen=True)
class Hand:
    """The knowledge of attackers: the state, honest results, their claims, and what an honest step of their own would be."""

    arena: ByExpert
    theta: State
    honest: Sequence[State]
    claims: Sequence[Claim]
    own: State
    rng: np.random.Generator

    @property
    def length(self) -> float:
        """Return how far an honest miner moves."""
        return norm(delta(self.theta, self.honest[0]))

    def blurred(self, length: float) -> State:
        """Return the state under noise of so many honest lengths."""
        return plus(self.theta, (1.0, noise(self.theta, length * self.length, self.rng)))

    def along(self, factor: float) -> State:
        """Return an honest step of one's own, of so many times its length."""
        return plus(self.theta, (factor, delta(self.theta, self.own)))


Handed = tuple["State", "Claim | None"]


def _claimed(hand: Hand, change: Callable[[int], int]) -> Claim:
    return {layer: [change(n) for n in counts] for layer, counts in hand.claims[0].items()}


def _least(hand: Hand) -> Claim:
    """Claim all tokens for the expert that the target uses least."""
    return {
        layer: [sum(counts) // 4 if place == counts.index(min(counts)) else 0 for place in range(len(counts))]
        for layer, counts in hand.claims[0].items()
    }


def _hidden_harm(hand: Hand) -> Handed:
    """Return useful rows of the expert that is claimed, and rows that break the others, which are not."""
    claim, bad = _least(hand), delta(hand.theta, hand.blurred(3.0))
    good = delta(hand.theta, hand.own)
    moved = {}
    for name, rows in hand.theta.items():
        kept = np.array(claim[int(name.split(".")[1])]) > 0
        step = bad[name].clone()
        step[kept] = good[name][kept]
        moved[name] = rows + step
    return moved, claim


def _harm(hand: Hand) -> State:
    """Return work that raises the loss of general text and lowers the target's."""
    good = hand.arena.shard(HONEST, 1, 16)
    general = np.concatenate([text(domain, 32, 70_001, LENGTH) for domain in GENERAL])
    return hand.arena.sabotage(hand.arena.start().state, good, batched(general, good.shape[1]))


def _true(hand: Hand) -> Claim:
    return hand.claims[0]


ATTACKS: Mapping[str, Callable[[Hand], list[Handed]]] = {
    "a little noise, to be merged with the gainless": lambda h: [(h.blurred(0.1), _true(h))],
    "noise": lambda h: [(h.blurred(1.0), _true(h))],
    "noise, no claim": lambda h: [(h.blurred(1.0), None)],
    "noise, three of them": lambda h: [(h.blurred(1.0), _true(h)) for _ in range(3)],
    "much noise, tokens × 4": lambda h: [(h.blurred(3.0), _claimed(h, lambda n: min(4 * n, 2000)))],
    "sign flip": lambda h: [(h.along(-1.0), _true(h))],
    "sign flip, three of them": lambda h: [(h.along(-f), _true(h)) for f in (0.8, 1.0, 1.2)],
    "nothing done": lambda h: [(dict(h.theta), _true(h))],
    "own work × 2": lambda h: [(h.along(2.0), _true(h))],
    "own work × 4": lambda h: [(h.along(4.0), _true(h))],
    "own work × 8": lambda h: [(h.along(8.0), _true(h))],
    "own work × 4, one expert claimed": lambda h: [(h.along(4.0), _least(h))],
    "own work, no tokens claimed": lambda h: [(h.along(1.0), _claimed(h, lambda n: 0))],
    "harm where nothing is claimed": lambda h: [_hidden_harm(h)],
    "useful on the target, harm to general text": lambda h: [(_harm(h), _true(h))],
    "the same, claimed for one expert": lambda h: [(_harm(h), _least(h))],
    "the same, three of them": lambda h: [(_harm(h), _true(h)) for _ in range(3)],
}  # fmt: skip


def run(options: Options) -> Result:
    """Try every attack, on one base a seed."""
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS, expert_steps=32) as each:
        for rig in each:
            for steps in STEPS:
                with tempfile.TemporaryDirectory() as folder:
                    rows += _seed(ByExpert(rig, "non-IID", Path(folder), steps=steps), options.only)
    figures = {
        f"{name}; {steps}": _means([row for row in rows if (row["attack"], row["steps"]) == (name, steps)])
        for name, steps in dict.fromkeys((row["attack"], row["steps"]) for row in rows)
    }
    return Result({"honest_miners": HONEST, **rig_settings(options, QUICK_SEEDS)}, rows, figures)


def _seed(arena: ByExpert, only: str) -> list[dict[str, Any]]:
    from connito.moe.state import load_state

    standing = arena.start()
    honest = arena.honest(standing, 1)
    hand = Hand(
        arena, load_state(standing.state), honest, [arena.claim(miner) for miner in range(HONEST)],
        arena.train(standing.state, arena.shard(HONEST, 1)), np.random.default_rng([arena.rig.seed, 45]),
    )  # fmt: skip
    true: list[Handed] = list(zip(honest, hand.claims, strict=True))
    clean = _play(arena, standing, true, [])
    rows = [_row(arena, "nobody", clean, clean, 0)]
    for name, make in ATTACKS.items():
        if only and only not in name:
            continue
        note(f"seed {arena.rig.seed}, {arena.steps} steps: {name}")
        forged = make(hand)
        rows.append(_row(arena, name, _play(arena, standing, true, forged), clean, len(forged)))
    return rows


def _play(arena: ByExpert, standing: Standing, honest: Sequence[Handed], forged: Sequence[Handed]) -> MergedCycle:
    from connito.moe.state import save_state

    folder = arena.folder / f"run-{len(list(arena.folder.iterdir()))}"
    folder.mkdir()
    uploads = []
    for name, of in (("honest", honest), ("attacker", forged)):
        for place, (state, claim) in enumerate(of, 1):
            path = folder / f"{name}-{place}.safetensors"
            save_state(state, path, metadata_of(claim) if claim is not None else {})
            uploads.append(Upload(f"{name}-{place}", path, name == "honest"))
    return arena.play(1, standing, uploads, 3, {})


def _row(arena: ByExpert, name: str, played: MergedCycle, clean: MergedCycle, count: int) -> dict[str, Any]:
    hostile, honest = [f"attacker-{place + 1}" for place in range(count)], [f"honest-{n + 1}" for n in range(HONEST)]
    merged = set(played.merged.version.merged)
    return {
        "attack": name,
        "seed": arena.rig.seed,
        "steps": arena.steps,
        "told": {miner: reason_name(played.reason(miner)) for miner in [*hostile, *honest]},
        "gate": plain_name(cycle_pb2.GateDecision, played.merged.version.gate),
        "found": sum(played.reason(miner) != 0 for miner in hostile),
        "merged": len(merged & set(hostile)),
        "hand_ins": count,
        "earned": sum(played.reward(miner) for miner in hostile),
        "honest_earned": sum(played.reward(miner) for miner in honest) / HONEST,
        "honest_merged": len(merged & set(honest)),
        "target": played.loss(TARGET),
        "gained": played.loss(TARGET, "before") - played.loss(TARGET),
        "rise": played.loss(TARGET) - clean.loss(TARGET),
        "general": played.loss("general") - clean.loss("general"),
    }


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    paid = sum(row["honest_earned"] for row in rows)
    return {
        "found": f"{sum(row['found'] for row in rows)} of {sum(row['hand_ins'] for row in rows)}",
        "merged": sum(row["merged"] for row in rows),
        "earned": round(sum(row["earned"] for row in rows) / paid, 3) if paid else None,
        "gate": ", ".join(dict.fromkeys(row["gate"] for row in rows)),
        "honest_merged": round(float(np.mean([row["honest_merged"] for row in rows])), 2),
        "gained": spread([row["gained"] for row in rows]),
        "rise": spread([row["rise"] for row in rows]),
        "general": spread([row["general"] for row in rows]),
    }


if __name__ == "__main__":
    main("merge_lies", run, doc=__doc__, seeds=3)
