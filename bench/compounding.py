"""Does a shelf of experts make the next domain cheaper? Steps to a target loss, from the base against from the shelf.

A chain of domains is learnt one after the other on one base. For each, the same training text in the same order is
trained twice: from the base's own rows, and from what the selector's rule (`connito.experts.start`) picks among the experts
that the chain has left so far, which may be none. The target is 90 % of the way that training from the base comes in its
budget of steps; what counts is the first of the regular looks at held-out loss that is at or below it.

Two chains: `dialects`, whose neighbours share half of their words and one of two sentence frames, and `strangers`, four
scripts that share nothing. The first is where a shelf should help, the second where it should not, and where the rule
should know that. Measured on the tiny base, one torch thread.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compose_setup import base
from bench.harness import Options, Result, by_seed, interval, main, note
from bench.plots import axes
from bench.tiny_rig import LENGTH, Rig, Tokens, rig_settings, spread, used_seeds

if TYPE_CHECKING:
    from connito.library.start import Shelved
    from connito.moe.selection import Selection

DIALECTS, QUICK_SEEDS = 4, 1
STEPS, LOOK, BATCH, RATE = 40, 4, 4, 3e-3
PER_LAYER, HELPERS, HELD, PROBE = 4, 2, 24, 24
SHARE = 0.9
_WORDS = """
anchor barrel candle dagger engine falcon garnet hammer island jacket kettle lantern magnet needle orchid pepper
quartz ribbon saddle timber urchin velvet walnut xenial yonder zephyr bottle copper dimple elbow fiddle goblet
"""


@dataclass
class Chain:
    """A row of domains and how to write text of one: (domain, seed, count) -> documents."""

    name: str
    domains: Sequence[str]
    shelf: list[Shelved] = field(default_factory=list)

    def text(self, domain: str, count: int, seed: int) -> Tokens:
        """Return `count` sequences [count, LENGTH + 1]."""
        from connito.base.tiny import blocks, tiny_texts

        documents = (
            _dialect(int(domain.rpartition("-")[2]), seed, 4 + count)
            if self.name == "dialects"
            else tiny_texts(domain, seed, 4 + count)
        )
        return np.asarray(blocks(documents, LENGTH + 1).numpy()[:count], dtype=np.int32)


_FRAMES = (
    "The {} of the {} lies under a {}; {}s need it.",
    "{} > {} > {} ({})",
    "Whoever sold a {} for two {}s bought no {}, no {}.",
    "{}: see {}, {} and {}",
    "A {} in the {}, a {} by the {}!",
    "[{}] {}={} // {}",
)


def _dialect(number: int, seed: int, count: int) -> list[str]:
    """Return sentences over eight words in two frames; four of the words and one frame are the next dialect's too."""
    rng = random.Random(f"bench.compounding:{number}:{seed}")
    words = _WORDS.split()[4 * number : 4 * number + 8]
    frames = _FRAMES[number : number + 2]
    lines = [rng.choice(frames).format(*(rng.choice(words) for _ in range(4))) for _ in range(7 * count)]
    return ["\n".join(lines[start : start + 7]) for start in range(0, len(lines), 7)]


def run(options: Options) -> Result:
    """Run both chains, for every seed."""
    rows = by_seed(options, "compounding", _seed, used_seeds(options, QUICK_SEEDS))
    _plot(rows, options.out / "compounding.svg")
    settings = {
        "in_parts": True,
        **rig_settings(options, QUICK_SEEDS), "steps": STEPS, "look_every": LOOK, "batch": BATCH, "learning_rate": RATE,
        "experts_per_layer": PER_LAYER, "target_share": SHARE, "held_sequences": HELD,
    }  # fmt: skip
    return Result(settings, rows, _figures(rows, used_seeds(options, QUICK_SEEDS)))


def _seed(seed: int) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(seed, base(Path(folder), seed))
        for chain in _chains():
            note(f"  {chain.name}")
            (Path(folder) / chain.name).mkdir()
            rows += _learn(rig, chain, Path(folder) / chain.name)
    return rows


def _chains() -> list[Chain]:
    from connito.base.tiny import DOMAINS

    dialects = [f"dialect-{number}" for number in range(DIALECTS)]
    return [Chain("dialects", dialects), Chain("strangers", list(DOMAINS))]


def _learn(rig: Rig, chain: Chain, folder: Path) -> list[dict[str, Any]]:
    """Return one row a domain; the shelf grows with each trained expert."""
    rows = []
    for place, domain in enumerate(chain.domains):
        selection = _select(rig, chain, domain)
        batches = chain.text(domain, STEPS * BATCH, 2000 + rig.seed).reshape(STEPS, BATCH, LENGTH + 1)
        held = chain.text(domain, HELD, 9000 + rig.seed)
        choice, start = _start(rig, chain, domain, selection)
        base_curve, base_state = _train(rig, selection, None, batches, held)
        shelf_curve, state = (base_curve, base_state) if start is None else _train(rig, selection, start, batches, held)
        target = base_curve[0] - SHARE * (base_curve[0] - min(base_curve))
        row = {
            "seed": rig.seed, "chain": chain.name, "place": place, "domain": domain, "target_loss": target,
            "started_from": choice, "loss_base": base_curve[0], "loss_start": shelf_curve[0],
            "steps_from_base": _steps(base_curve, target), "steps_from_shelf": _steps(shelf_curve, target),
            "reached_from_shelf": min(shelf_curve) <= target,
            "end_from_base": base_curve[-1], "end_from_shelf": shelf_curve[-1],
        }  # fmt: skip
        note(
            f"  {domain}: {row['steps_from_base']} steps from the base, {row['steps_from_shelf']} from {choice or 'the base'}"
        )
        rows.append(row)
        chain.shelf.append(_deposit(folder, domain, selection, state))
    return rows


def _select(rig: Rig, chain: Chain, domain: str) -> Selection:
    from connito.moe.budget import Budget
    from connito.moe.selection import select_experts
    from connito.moe.statistics import collect

    statistics = collect(rig.model(), chain.text(domain, PROBE, 6000 + rig.seed)[:, :-1])
    return select_experts(
        statistics, "esft-token", 1.0, budget=Budget(PER_LAYER, scope="layer"), helpers_per_layer=HELPERS, domain=domain
    )


def _start(rig: Rig, chain: Chain, domain: str, selection: Selection) -> tuple[str, Any]:
    """Return the selector's choice of a start: (expert id or "", θ_0 or None)."""
    from connito.experts.start import propose
    from connito.v1 import run_pb2

    spec = run_pb2.RunSpec(domain=domain, start_from="auto", license="CC0-1.0")
    spec.scoring.confidence = 0.95
    probe = chain.text(domain, PROBE, 6000 + rig.seed)
    found = propose(rig.model(), spec, selection, probe, chain.shelf, len(chain.shelf))
    return found.choice.expert_id, found.state


def _train(
    rig: Rig, selection: Selection, start: Mapping[str, Any] | None, batches: Tokens, held: Tokens
) -> tuple[list[float], Any]:
    """Return held-out loss of the full model before the first step and at every look, and the last state."""
    from connito.moe.evaluate import Evaluator
    from connito.moe.resident import compress, read_targets, write_targets
    from connito.moe.training import Step, train_local

    evaluator = Evaluator(rig.model(), selection)
    local = compress(rig.model(), selection.layers, selection.helpers)
    if start is not None:
        write_targets(local, start)
    curve: list[float] = []

    def look() -> None:
        sums, tokens = evaluator.losses(read_targets(local), held)
        curve.append(float(sums.sum() / tokens.sum()))

    def on_step(step: Step) -> None:
        if (step.index + 1) % LOOK == 0:
            look()

    look()
    state, _ = train_local(local, batches, learning_rate=RATE, on_step=on_step)
    return curve, state


def _steps(curve: Sequence[float], target: float) -> int:
    """Return steps at the first look at or below the target; the whole budget where there is none."""
    return next((LOOK * number for number, loss in enumerate(curve) if loss <= target), STEPS)


def _deposit(folder: Path, domain: str, selection: Selection, state: Any) -> Shelved:
    from connito.library.artifact import ExpertHeader, write_expert
    from connito.library.start import Shelved
    from connito.moe.state import save_state
    from connito.v1 import run_pb2

    layers = {layer: sorted(experts) for layer, experts in selection.layers.items()}
    save_state(state, folder / f"{domain}.state")
    digest = write_expert(
        folder / f"{domain}.state", folder / f"{domain}.expert", ExpertHeader(domain, "tiny", "b", layers, domain, 1)
    )
    deposit = run_pb2.ExpertDeposited(run=domain, expert_id=domain, domain=domain)
    deposit.expert.digest = digest
    return Shelved(deposit, {"license": "CC0-1.0"}, folder / f"{domain}.expert")


def _figures(rows: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Return, per chain, the steps saved over the domains that had a shelf, one value a seed, with intervals over seeds."""
    figures: dict[str, Any] = {}
    for chain in ("dialects", "strangers"):
        later = [row for row in rows if row["chain"] == chain and row["place"] > 0]
        saved = [
            1 - sum(row["steps_from_shelf"] for row in mine) / sum(row["steps_from_base"] for row in mine)
            for seed in range(seeds)
            if (mine := [row for row in later if row["seed"] == seed])
        ]
        taken = [row for row in later if row["started_from"]]
        figures[f"{chain}: steps saved, share"] = spread(saved)
        figures[f"{chain}: started from the shelf"] = f"{len(taken)} of {len(later)}"
        figures[f"{chain}: slower than from the base"] = sum(
            row["steps_from_shelf"] > row["steps_from_base"] for row in later
        )
        figures[f"{chain}: loss at the end, shelf − base"] = spread(
            [
                float(np.mean([row["end_from_shelf"] - row["end_from_base"] for row in later if row["seed"] == seed]))
                for seed in range(seeds)
            ]
        )
    return figures


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the steps to the target by place in the chain, from the base and from a library expert, with intervals over seeds."""
    with axes(path, 2) as panels:
        for axis, chain in zip(panels, ("dialects", "strangers"), strict=True):
            mine = [row for row in rows if row["chain"] == chain]
            places = sorted({row["place"] for row in mine})
            for key, label, color in (
                ("steps_from_base", "from the base", "#8a8a8a"),
                ("steps_from_shelf", "from the shelf", "#0b6e99"),
            ):
                bands = [interval([float(row[key]) for row in mine if row["place"] == place]) for place in places]
                numbered = list(zip([place + 1 for place in places], bands, strict=True))
                axis.line([(n, mean) for n, (mean, _, _) in numbered], color, label, dots=True)
                axis.band(
                    [(n, max(0, low)) for n, (_, low, _) in numbered],
                    [(n, high) for n, (_, _, high) in numbered],
                    color,
                )
            axis.title, axis.x_label = chain, "domain of the chain"
            axis.level(0)
        panels[0].y_label = f"steps to {SHARE:.0%} of the base's gain"


if __name__ == "__main__":
    main("compounding", run, doc=__doc__, seeds=5)
