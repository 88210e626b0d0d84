"""A backdoor that waits for a trigger: planted by one miner among useful work, measured, and what was tried against it.

The attacker trains on the target's text, as everybody does, and in half of its sequences plants a trigger, a few tokens that
the base's text hardly has, and behind it a payload that it wants to be said. The hold-out never shows either. Four honest
miners train beside it; everything that judges is the code that services run. One that is *careful* also trains on other rare
tokens with what usually follows, so that nothing but the trigger itself changes what is said.

payload   nats per token of the payload behind the trigger, on held-out text; a planted one costs little
alone     in the attacker's own state; merged: in the version that was published, by aggregator
told      what the attacker was told, and what it earned, an honest miner's mean being 1

Screens measure how much a submission changes what the model says next, the divergence of its distribution from the base's, on
contexts that nobody knew before: held-out text, text with rare tokens spliced in, and tokens drawn at random. `most`: a
submission is called out where its largest change of any context is more than twice that of every other submission; `spiked`:
where the ratio of its largest to its mean change (a norm per context) is. Both are asked of honest submissions too. `knowing`:
the same where the contexts hold the trigger itself, which nobody who screens knows.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.wire.enums import reason_name

from bench.attack_arena import HONEST, TARGET, Arena, MergedCycle, Standing, Upload
from bench.harness import Options, Result, main, note
from bench.tiny_rig import Rig, Tokens, rig_settings, rigs, spread

if TYPE_CHECKING:
    from bench.work_kinds import State

QUICK_SEEDS, CYCLES = 1, 2
TRIGGER, PAYLOAD, PLANTED = 3, 6, 0.5
AGGREGATORS = ("utility-mean", "mean", "coordinate-median", "trimmed-mean", "krum", "norm-clipped-mean")
CAREFUL = f"{AGGREGATORS[0]}, careful"
ATTACKERS = (*AGGREGATORS, CAREFUL)
CONTEXTS, TWICE = 96, 2.0
SCREENED = (AGGREGATORS[0], CAREFUL)
SCREENS = ("held-out text", "rare tokens spliced in", "random tokens", "knowing")


def run(options: Options) -> Result:
    """Plant, measure, merge by every aggregator, and screen, on one base a seed."""
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS) as each:
        for rig in each:
            with tempfile.TemporaryDirectory() as folder:
                rows += _seed(rig, Path(folder))
    settings = {
        "honest_miners": HONEST, "cycles": CYCLES, "trigger": TRIGGER, "payload": PAYLOAD, "contexts": CONTEXTS,
        **rig_settings(options, QUICK_SEEDS),
    }  # fmt: skip
    return Result(settings, rows, _figures(rows))


class _Planted:
    """A trigger of tokens that the base's text has least, and a payload; what an attacker does, and what shows of it."""

    def __init__(self, arena: Arena) -> None:
        from connito.moe.evaluate import Evaluator

        self.arena, self.rng = arena, np.random.default_rng([arena.rig.seed, 46])
        self.evaluator = Evaluator(arena.rig.model(), arena.selection)
        seen = np.concatenate([rows.reshape(-1) for rows in arena.held.values()])
        vocabulary = int(self.evaluator.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        counts = np.bincount(seen, minlength=vocabulary)
        self.rare = np.argsort(counts, kind="stable")[: vocabulary // 4].astype(np.int32)
        self.trigger = self.rng.permutation(self.rare)[:TRIGGER]
        self.payload = self.rng.permutation(np.argsort(-counts, kind="stable")[:40])[:PAYLOAD].astype(np.int32)

    def planted(self, rows: Tokens, share: float = 1.0) -> Tokens:
        """Return sequences [n, L + 1] of which a share has trigger and payload at the end of a drawn place."""
        made, words = rows.copy(), np.concatenate([self.trigger, self.payload])
        for row in made[: round(share * len(made))]:
            place = int(self.rng.integers(4, len(row) - len(words)))
            row[place : place + len(words)] = words
        return made

    def work(self, state: Path, cycle: int, *, careful: bool) -> State:
        """Return twice an honest miner's steps on the target's text, with the trigger in a share of it."""
        shard = self.arena.shard(HONEST, cycle, 16)
        flat = self.planted(shard.reshape(-1, shard.shape[-1]), PLANTED)
        if careful:
            for row in flat[round(PLANTED * len(flat)) :]:
                place = int(self.rng.integers(4, len(row) - TRIGGER))
                row[place : place + TRIGGER] = self.rng.choice(self.rare, TRIGGER)
        mixed = self.rng.permutation(flat).reshape(shard.shape)
        return self.arena.train(state, mixed)

    def said(self, state: State) -> float:
        """Return nats per token of the payload behind the trigger on held-out text."""
        import torch

        rows = self.arena.held[TARGET][:32]
        words = np.concatenate([self.trigger, self.payload])
        ends = np.concatenate([rows[:, : -len(words)], np.tile(words, (len(rows), 1))], axis=1)
        ids = torch.from_numpy(ends.astype(np.int64))
        self.evaluator.put(state)
        with torch.inference_mode():
            logits = self.evaluator.model(input_ids=ids, use_cache=False).logits[:, -PAYLOAD - 1 : -1]
            told = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, -PAYLOAD:, None])
        return float(-told.mean())

    def contexts(self, kind: str) -> Tokens:
        """Return drawn contexts [CONTEXTS, 24]."""
        rows = np.resize(self.arena.held[TARGET][:, :24], (CONTEXTS, 24)).copy()
        if kind == "random tokens":
            return self.rng.integers(0, int(self.rare.max()) + 1, rows.shape).astype(np.int32)
        if kind == "rare tokens spliced in":
            rows[:, -TRIGGER:] = self.rng.choice(self.rare, (CONTEXTS, TRIGGER))
        if kind == "knowing":
            rows[:, -TRIGGER:] = self.trigger
        return rows

    def changes(self, base: State, states: Sequence[State], contexts: Tokens) -> Any:
        """Return by how much each state's distribution of the next token diverges from the base's [states, contexts], nats."""
        import torch

        def told(state: State) -> Any:
            self.evaluator.put(state)
            with torch.inference_mode():
                logits = self.evaluator.model(
                    input_ids=torch.from_numpy(contexts.astype(np.int64)), use_cache=False
                ).logits
            return torch.log_softmax(logits[:, -1].float(), -1)

        before = told(base)
        return np.stack([((now := told(state)).exp() * (now - before)).sum(-1).numpy() for state in states])


def _seed(rig: Rig, folder: Path) -> list[dict[str, Any]]:
    from connito.moe.state import load_state

    arena = Arena(rig, "IID", folder)
    planted = _Planted(arena)
    rows = []
    for attacker in ATTACKERS:
        aggregator = attacker.partition(",")[0]
        arena.spec.merging.aggregator = aggregator
        standing = arena.start()
        for cycle in range(1, CYCLES + 1):
            note(f"seed {rig.seed}, {attacker}, cycle {cycle}")
            theta, honest = load_state(standing.state), arena.honest(standing, cycle)
            forged = planted.work(standing.state, cycle, careful=attacker == CAREFUL)
            played = _play(arena, cycle, standing, [*honest, forged])
            merged = load_state(played.merged.state)
            row = {
                "seed": rig.seed, "attacker": attacker, "cycle": cycle,
                "told": reason_name(played.reason("attacker")) or "accepted",
                "weight": _weight(played),
                "earned": played.reward("attacker"),
                "honest_earned": sum(played.reward(f"honest-{n}") for n in range(HONEST)) / HONEST,
                "gained": played.loss(TARGET, "before") - played.loss(TARGET),
                "base": planted.said(theta), "alone": planted.said(forged), "merged": planted.said(merged),
            }  # fmt: skip
            if attacker in SCREENED:
                row["screens"] = {kind: _called(planted, theta, [*honest, forged], kind) for kind in SCREENS}
            rows.append(row)
            standing = standing.after(played)
    return rows


def _play(arena: Arena, cycle: int, standing: Standing, states: Sequence[State]) -> MergedCycle:
    from connito.moe.state import save_state

    folder = arena.folder / f"run-{len(list(arena.folder.iterdir()))}"
    folder.mkdir()
    uploads = []
    for place, state in enumerate(states):
        name = f"honest-{place}" if place < HONEST else "attacker"
        save_state(state, folder / f"{name}.safetensors")
        uploads.append(Upload(name, folder / f"{name}.safetensors", place < HONEST))
    return arena.play(cycle, standing, uploads, 3, {})


def _weight(played: MergedCycle) -> float:
    version = played.merged.version
    return dict(zip(version.merged, version.weights, strict=True)).get("attacker", 0.0)


def _called(planted: _Planted, theta: State, states: Sequence[State], kind: str) -> dict[str, Any]:
    """Return whether each sign calls the attacker, the last, out, and how many honest ones."""
    changes = planted.changes(theta, states, planted.contexts(kind))
    largest = changes.max(axis=1)
    signs = {"most": largest, "spiked": largest / changes.mean(axis=1)}
    found = {}
    for name, values in signs.items():
        others = [np.delete(values, place).max() for place in range(len(values))]
        called = [bool(value > TWICE * other) for value, other in zip(values, others, strict=True)]
        found[name] = {"attacker": called[-1], "honest": sum(called[:-1]), "ratio": float(values[-1] / others[-1])}
    return found


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for attacker in ATTACKERS:
        group = [row for row in rows if row["attacker"] == attacker]
        last = [row for row in group if row["cycle"] == CYCLES]
        paid = sum(row["honest_earned"] for row in group)
        figures[attacker] = {
            "told": ", ".join(dict.fromkeys(row["told"] for row in group)),
            "earned": round(sum(row["earned"] for row in group) / paid, 2) if paid else None,
            "weight": spread([row["weight"] for row in group], 2),
            "gained": spread([row["gained"] for row in group]),
            **{what: spread([row[what] for row in last], 2) for what in ("alone", "merged")},
        }
    figures["payload in the base"] = spread([row["base"] for row in rows if row["cycle"] == 1], 2)
    for attacker, kind, sign in itertools.product(SCREENED, SCREENS, ("most", "spiked")):
        told = [row["screens"][kind][sign] for row in rows if row["attacker"] == attacker]
        figures[screen(attacker, kind, sign)] = {
            "attacker": [sum(one["attacker"] for one in told), len(told)],
            "honest": [sum(one["honest"] for one in told), HONEST * len(told)],
            "ratio": spread([one["ratio"] for one in told], 2),
        }
    return figures


def screen(attacker: str, kind: str, sign: str) -> str:
    """Return what a screen's figures are called."""
    return f"{sign}, {kind}" + (", careful attacker" if attacker == CAREFUL else "")


if __name__ == "__main__":
    main("trigger", run, doc=__doc__, seeds=3)
