"""Every attack of the threat model, with rates: found out, wrongly accused, earned, and what it did to the model.

Four honest miners of a tiny base, alike (IID) or with a domain each (non-IID), run cycles with real local training. The
attacker commits last, knowing all that the others made. A row compares three worlds that differ in nothing else: with
the attacker, without it, and with the attacker where nothing defends (every file that loads is averaged and paid alike).

found         attacker's hand-ins that were refused, or judged for the reason that fits
unpaid        of them, those that earned nothing, for whatever reason
earned        what the attackers got together, over the mean of an honest miner in the same cycles
earned naive  the same where nothing defends
accused       honest hand-ins that were called a copy, harmful, malformed or an outlier: false positives
model         rise of the published target loss by the attack, nats per token (negative: it helped)
model naive   the same where nothing defends; general, general naive: of the general domains
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from connito.wire.enums import reason_name

from bench.attack_arena import HONEST, TARGET, WORLDS, Arena, MergedCycle, Upload
from bench.attack_kinds import ATTACKS, Attack, Knowledge, upload
from bench.attack_messages import MESSAGE_ATTACKS
from bench.harness import Options, Result, interval, main, note
from bench.plots import Axes, axes
from bench.tiny_rig import Rig, rig_settings, rigs

QUICK_SEEDS, CYCLES = 1, 2
ACCUSATIONS = ("copy", "retention-broken", "outlier", "non-finite", "norm-exceeded", "bad-header", "wrong-shape")
QUICK = (
    "copier", "noisy copier, 1", "scaled copier, 1.5", "mixed copier, two", "free-rider", "random noise", "sign flip",
    "backdoor", "sybils, one work thrice", "1 of 3 validators inflates", "1 of 3 validators sinks",
    "header bomb, length", "duplicate keys",
)  # fmt: skip


def run(options: Options) -> Result:
    """Run all attacks in both worlds; a quick run takes a dozen of them, one seed, one cycle of the IID world."""
    rows: list[dict[str, Any]] = []
    chosen = [attack for attack in ATTACKS if not options.quick or attack.name in QUICK]
    with rigs(options, quick_seeds=QUICK_SEEDS) as each:
        for rig in each:
            for world in ("IID",) if options.quick else WORLDS:
                rows += _world(rig, world, chosen, 1 if options.quick else CYCLES)
    rows += _messages(options)
    table = _table(rows)
    with axes(options.out / "attacks.svg", 2) as panels:
        _draw(panels, table)
    settings = {
        "honest_miners": HONEST,
        "cycles": 1 if options.quick else CYCLES,
        "emission": "per cycle, halving by rank",
        **rig_settings(options, QUICK_SEEDS),
    }
    return Result(settings, rows, _figures(rows, table))


def _world(rig: Rig, world: str, attacks: list[Attack], cycles: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(rig, world, Path(folder))
        clean = _run(arena, None, cycles)
        rows += _rows(rig, world, None, clean, clean)
        for attack in attacks:
            note(f"seed {rig.seed}, {world}: {attack.name}")
            rows += _rows(rig, world, attack, _run(arena, attack, cycles), clean)
    return rows


Cycle = tuple[MergedCycle, list[str], tuple[float, float]]


def _run(arena: Arena, attack: Attack | None, cycles: int) -> list[Cycle]:
    """Return (outcome, attackers, target and general loss without any defence) for each cycle."""
    from connito.moe.state import load_state

    standing, found = arena.start(), []
    rng = np.random.default_rng([arena.rig.seed, 7])
    for cycle in range(1, cycles + 1):
        folder = arena.folder / f"run-{len(list(arena.folder.iterdir()))}"
        folder.mkdir()
        victims = arena.honest(standing, cycle)
        know = Knowledge(arena, cycle, standing, load_state(standing.state), victims, rng)
        honest = [
            Upload(f"honest-{place + 1}", upload(know, state, folder / f"honest-{place}"))
            for place, state in enumerate(victims)
        ]
        forged = list(attack.forge(know)) if attack is not None else []
        hostile = [
            Upload(f"attacker-{place + 1}", upload(know, made, folder / f"attacker-{place}"), honest=False)
            for place, made in enumerate(forged)
        ]
        validators = attack.validators if attack is not None else 3
        lies = attack.lies(validators) if attack is not None else {}
        played = arena.play(cycle, standing, [*honest, *hostile], validators, lies)
        found.append((played, [entry.miner for entry in hostile], arena.naive(standing, [*honest, *hostile])))
        standing = standing.after(played)
    return found


def _rows(rig: Rig, world: str, attack: Attack | None, cycles: list[Cycle], clean: list[Cycle]) -> list[dict[str, Any]]:
    rows = []
    for number, ((played, hostile, naive), (without, _, naive_without)) in enumerate(
        zip(cycles, clean, strict=True), 1
    ):
        honest = [f"honest-{place + 1}" for place in range(HONEST)]
        told = {miner: reason_name(played.reason(miner)) for miner in [*hostile, *honest]}
        rows.append(
            {
                "attack": attack.name if attack is not None else "nobody",
                "world": world,
                "seed": rig.seed,
                "cycle": number,
                "told": told,
                "found": [told[miner] in attack.found for miner in hostile] if attack is not None else [],
                "unpaid": [played.reward(miner) == 0 for miner in hostile],
                "earned": sum(played.reward(miner) for miner in hostile),
                "honest_earned": sum(played.reward(miner) for miner in honest) / HONEST,
                "honest_rewards": {miner: played.reward(miner) for miner in honest},
                "accused": [told[miner] in ACCUSATIONS for miner in honest],
                "unrewarded": [played.reward(miner) == 0 for miner in honest],
                "gate": int(played.merged.version.gate),
                "target_loss": played.loss(TARGET),
                "general_loss": played.loss("general"),
                "model": played.loss(TARGET) - without.loss(TARGET),
                "general": played.loss("general") - without.loss("general"),
                "model_naive": naive[0] - naive_without[0] if math.isfinite(naive[0]) else math.inf,
                "general_naive": naive[1] - naive_without[1] if math.isfinite(naive[1]) else math.inf,
            }
        )
    return rows


def _messages(options: Options) -> list[dict[str, Any]]:
    rows = []
    for name, trial in MESSAGE_ATTACKS.items():
        note(f"messages: {name}")
        rows.append({"attack": name, "world": "messages", **trial(options.quick)})
    return rows


def _table(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return means by (attack, world)."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["attack"], row["world"]), []).append(row)
    return {key: _means(group) for key, group in found.items()}


def _means(group: list[dict[str, Any]]) -> dict[str, Any]:
    if group[0]["world"] == "messages":
        return {name: value for name, value in group[0].items() if name not in ("attack", "world")}
    hostile = sum(len(row["unpaid"]) for row in group)
    honest = max(1e-9, sum(row["honest_earned"] for row in group))
    identities = len(group[0]["unpaid"])
    return {
        "found": _share([hit for row in group for hit in row["found"]]) if hostile else None,
        "unpaid": _share([hit for row in group for hit in row["unpaid"]]) if hostile else None,
        "earned": round(sum(row["earned"] for row in group) / honest, 3),
        "earned_naive": float(identities),
        "accused": _share([hit for row in group for hit in row["accused"]]),
        "unrewarded": _share([hit for row in group for hit in row["unrewarded"]]),
        "model": [round(value, 4) for value in interval([row["model"] for row in group])],
        "general": round(float(np.mean([row["general"] for row in group])), 4),
        "model_naive": round(float(np.mean([row["model_naive"] for row in group])), 4),
        "general_naive": round(float(np.mean([row["general_naive"] for row in group])), 4),
    }


def _share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def _figures(rows: list[dict[str, Any]], table: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {f"{attack} [{world}]": dict(entry) for (attack, world), entry in table.items()}
    for world in WORLDS:
        honest = [hit for row in rows if row["world"] == world for hit in row["accused"]]
        if honest:
            figures[f"honest hand-ins accused [{world}]"] = f"{sum(honest)} of {len(honest)}"
    return figures


def _draw(panels: list[Axes], table: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    earned, model = panels
    entries = {attack: entry for (attack, world), entry in table.items() if world == "IID" and attack != "nobody"}
    names = list(entries)
    for axis, pair, label in (
        (earned, ("earned_naive", "earned"), "earned, honest miners' mean = 1"),
        (model, ("model_naive", "model"), "rise of target loss (nats per token)"),
    ):
        for offset, (key, colour) in enumerate(zip(pair, ("#cf8a8f", "#2f6f4f"), strict=True)):
            raw = [entries[name][key] for name in names]
            values = [value[0] if isinstance(value, list) else value for value in raw]
            shown = [min(value, 1.0) if key == "model_naive" else value for value in values]
            for row, value in enumerate(shown):
                axis.bar(row - 0.2 + 0.4 * offset, value, 0.38, colour)
            axis.key(key.replace("_", " "), colour)
        axis.rows(names)
        axis.x_label = label


if __name__ == "__main__":
    main("attacks", run, doc=__doc__, seeds=3)
