"""Distance between honest work and copies, in each of the three signs that copies are found by.

Six honest miners of a tiny base after few local steps (as `connito up` takes) and after many, alike (IID) or with a
domain each (non-IID), and what thieves make of the first ones' work: under noise, scaled, mixed, half their own. Each
is compared with the earlier ones only, by the functions that the aggregator and the auditor use.

pair    largest cosine with an earlier pseudo-gradient
span    R: share of its length in the span of all earlier ones
effect  smallest relative distance of its gains, sequence by sequence, to those of one or two earlier ones

A limit between the two groups is good when honest work stays on one side in every world: `highest honest` (for effect:
lowest) and the limit of the tiny profile are in the figures, beside the share of forgeries beyond it.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.protocol.scoring.copies import cosines, distance, explained
from connito.protocol.scoring.evaluation import Part

from bench.attack_arena import HONEST, WORLDS, Arena
from bench.attack_kinds import Knowledge, mixed, upload
from bench.harness import Options, Result, main, note
from bench.plots import GREEN, RED, Axes, axes
from bench.tiny_rig import Rig, rig_settings, rigs

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

QUICK_SEEDS, MINERS, STEPS = 1, 6, (8, 30)
SIGNS = ("pair", "span", "effect")


def _under(length: float) -> Callable[[Knowledge], Any]:
    return lambda know: mixed(know, {0: 1.0}, length)


FORGERIES: Mapping[str, Callable[[Knowledge], Any]] = {
    "copy": lambda know: mixed(know, {0: 1.0}),
    **{f"noise {length:g}": _under(length) for length in (0.1, 0.33, 0.5, 1.0, 2.0)},
    "scaled 0.5": lambda know: mixed(know, {0: 0.5}),
    "scaled 1.5": lambda know: mixed(know, {0: 1.5}),
    "two mixed": lambda know: mixed(know, {0: 0.5, 1: 0.5}),
    "all mixed": lambda know: mixed(know, dict.fromkeys(range(HONEST), 1 / HONEST)),
    "two mixed, noise 1": lambda know: mixed(know, {0: 0.5, 1: 0.5}, 1.0),
    "half own": lambda know: mixed(know, {0: 0.5}, own=0.5),
}


def run(options: Options) -> Result:
    """Run both worlds and both numbers of steps; a quick run takes one seed."""
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS) as each:
        for rig in each:
            for world, steps in itertools.product(WORLDS, STEPS):
                note(f"seed {rig.seed}, {world}, {steps} steps")
                with tempfile.TemporaryDirectory() as folder:
                    rows += _compared(rig, world, steps, Path(folder))
    with axes(options.out / "copies.svg", 3) as panels:
        _draw(panels, rows)
    return Result({"miners": MINERS, "local_steps": STEPS, **rig_settings(options, QUICK_SEEDS)}, rows, _figures(rows))


def _compared(rig: Rig, world: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    from connito.moe.state import load_state

    arena = Arena(rig, world, folder)
    standing = arena.start()
    theta = load_state(standing.state)
    # Text of their own: a thief's own work, where it does some, is on the shard of number `HONEST`.
    shards = [arena.shard(10 + miner, 1, steps) for miner in range(MINERS)]
    honest = [arena.train(standing.state, shard) for shard in shards]
    know = Knowledge(arena, 1, standing, theta, honest, np.random.default_rng([rig.seed, steps]))
    gains = [_gains(know, state, place) for place, state in enumerate(honest)]
    common = {"world": world, "steps": steps, "seed": rig.seed}
    rows = []
    for later in range(1, MINERS):
        signs = _signs(theta, honest[:later], honest[later], gains[:later], gains[later])
        rows.append({**common, "kind": "honest", **signs})
    for kind, forge in FORGERIES.items():
        made = forge(know)
        signs = _signs(theta, honest[:-1], made, gains[:-1], _gains(know, made, 99))
        rows.append({**common, "kind": kind, **signs})
    return rows


Gains = dict[tuple[str, int], float]


def _gains(know: Knowledge, state: State, place: int) -> Gains:
    """Return losses by (domain, sequence), as a validator's report has them."""
    from connito.workloads.scoring import SubmissionFiles

    bench, stop = know.arena.score_bench, threading.Event()
    path = upload(know, state, know.arena.folder / f"compared-{place}")
    drawn = bench.draw(bytes(32))
    before = bench.incumbent(know.standing.state, drawn, stop)
    found = bench.submission(know.standing.state, SubmissionFiles(path, None), drawn, before, stop, "it")
    gains: Gains = {}
    for domain, numbers in drawn.items():
        part = Part(domain, 0, len(numbers))
        fallen = found.before(part).sums - found.after(part).sums
        gains |= {(domain, number): float(gain) for number, gain in zip(numbers, fallen, strict=True)}
    return gains


def _signs(
    theta: State, earlier: Sequence[State], later: State, gains: Sequence[Gains], mine: Gains
) -> dict[str, float]:
    rows = np.stack([_flat(theta, state) for state in (*earlier, later)])
    similarity, last = cosines(rows @ rows.T), len(earlier)
    groups = [group for count in (1, 2) for group in itertools.combinations(range(last), count)]
    nearest = min(distance(mine, [gains[place] for place in group]) * len(group) for group in groups)
    return {
        "pair": round(float(similarity[last, :last].max()), 4),
        "span": round(explained(similarity, range(last), last)[0], 4),
        "effect": round(nearest, 4),
    }


def _flat(theta: State, state: State) -> Any:
    return np.concatenate(
        [(theta[name] - state[name]).numpy().astype(np.float64).reshape(-1) for name in sorted(theta)]
    )


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from connito.local.defaults import UpOptions, profile

    policy = profile(UpOptions(base="tiny").checked()).spec.scoring
    limits = {
        "pair": policy.copy_threshold,
        "span": policy.copy_span_threshold,
        "effect": policy.copy_effect_threshold,
    }
    figures: dict[str, Any] = {f"limit, {sign}": limit for sign, limit in limits.items()}
    for world, steps in itertools.product(WORLDS, STEPS):
        mine = [row for row in rows if (row["world"], row["steps"], row["kind"]) == (world, steps, "honest")]
        where = f"[{world}, {steps} steps]"
        figures[f"highest honest pair {where}"] = max(row["pair"] for row in mine)
        figures[f"highest honest span {where}"] = max(row["span"] for row in mine)
        figures[f"lowest honest effect {where}"] = min(row["effect"] for row in mine)
    for kind in FORGERIES:
        forged = [row for row in rows if row["kind"] == kind]
        beyond = {sign: [_beyond(row, sign, limits) for row in forged] for sign in SIGNS}
        figures[f"beyond a limit, {kind}"] = {
            **{sign: f"{sum(hits)} of {len(hits)}" for sign, hits in beyond.items()},
            "any": f"{sum(map(any, zip(*beyond.values(), strict=True)))} of {len(forged)}",
        }
    honest = [row for row in rows if row["kind"] == "honest"]
    wrong = sum(any(_beyond(row, sign, limits) for sign in SIGNS) for row in honest)
    figures["beyond a limit, honest"] = f"{wrong} of {len(honest)}"
    return figures


def _beyond(row: Mapping[str, Any], sign: str, limits: Mapping[str, float]) -> bool:
    return bool(row[sign] <= limits[sign] if sign == "effect" else row[sign] >= limits[sign])


def _draw(panels: Sequence[Axes], rows: list[dict[str, Any]]) -> None:
    kinds = ["honest", *FORGERIES]
    for axis, sign in zip(panels, SIGNS, strict=True):
        for place, kind in enumerate(kinds):
            values = [min(row[sign], 1.0) for row in rows if row["kind"] == kind]
            axis.ticks(place, values, GREEN if kind == "honest" else RED)
        axis.rows(kinds)
        axis.x_label = sign


if __name__ == "__main__":
    main("copies", run, doc=__doc__, seeds=3)
