"""Comparison of routing modes and choices of helpers for tokens whose expert is not in memory, judged on the full model.

Beside the modes: one *background* expert, the mean of the absent ones weighted by their use, in place of a helper. `strayed`
is KL(full model || compressed one) on held-out text of the target before any training, in nats per token: what the forward
pass loses. Arms with the same number of frozen experts in memory are the ones to compare.

Tiny base whose experts were trained on all domains, so that it matters which one a token goes to. Target rows are
trained in a compressed model, inserted into the full one, and measured there: nats per token on held-out text of
the target, and the mean of the other domains. Differences between arms of equal memory are paired by seed. `complement`
keeps every other expert as a helper and, with natural routing, is the full model. `lost` is the share of that
reference's gain which the mode loses. This base normalises its gates over what was chosen, so that `masked` is `restricted` here.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.harness import Options, Result, interval, main, note
from bench.plots import axes
from bench.tiny_rig import Rig, Tokens, batched, everything_else, mean_loss, rig_settings, rigs, spread

TARGET, GENERAL = "recipes", ("logs", "poems", "ledgers")
PER_LAYER, HELPERS, RATE, BATCH, QUICK_SEEDS = 1, 2, 3e-3, 8, 3
REFERENCE = "natural, complement"
ARMS = [
    ("natural", "complement"),
    ("natural", f"{HELPERS - 1} helper + background"),
    ("natural", f"{HELPERS - 1} helper"),
    ("natural", "background"),
    *((mode, helpers) for mode in ("natural", "restricted") for helpers in (f"{HELPERS} helpers", "targets only")),
]  # fmt: skip
# With as many frozen experts in memory: what each costs over the other, seed by seed.
PAIRS = (
    (f"natural, {HELPERS - 1} helper + background", f"natural, {HELPERS} helpers"),
    ("natural, background", f"natural, {HELPERS - 1} helper"),
    (f"restricted, {HELPERS} helpers", f"natural, {HELPERS} helpers"),
)


def run(options: Options) -> Result:
    """Train in every mode on the same batches; loss of the full model afterwards."""
    steps, held = (24, 16) if options.quick else (120, 48)
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS, expert_steps=160) as each:
        for rig in each:
            note(f"seed {rig.seed}: training in {len(ARMS)} ways")
            rows += _round(rig, steps, held)
    names = [f"{mode}, {helpers}" for mode, helpers in ARMS]
    values = {name: [row["target"] for row in rows if row["arm"] == name] for name in names}
    before = [row["before"] for row in rows if row["arm"] == REFERENCE]
    with axes(options.out / "routing_modes.svg") as (axis,):
        axis.bars({"before": interval(before), **{name: interval(found) for name, found in values.items()}},
             "target loss of the full model (nats per token)")  # fmt: skip
    mass = spread([row["mass"] for row in rows if row["arm"] == REFERENCE])
    figures: dict[str, Any] = {"before": spread(before), "share_of_tokens_on_targets": mass}
    gains = [b - after for b, after in zip(before, values[REFERENCE], strict=True)]
    for name in names:
        figures[name] = spread(values[name])
        lost = [(after - best) / gain for after, best, gain in zip(values[name], values[REFERENCE], gains, strict=True)]
        figures[f"lost, {name}"] = spread(lost)
        figures[f"strayed, {name}"] = spread([row["strayed"] for row in rows if row["arm"] == name])
        figures[f"elsewhere, {name}"] = spread([row["elsewhere"] for row in rows if row["arm"] == name])
    for one, other in PAIRS:
        for what in ("target", "strayed"):
            pair = [[row[what] for row in rows if row["arm"] == arm] for arm in (one, other)]
            figures[f"{what}, {one} minus {other}"] = spread([a - b for a, b in zip(*pair, strict=True)])
    settings = {
        "target": TARGET,
        "experts_selected": f"{PER_LAYER} of 8 in each of 2 layers",
        "steps": steps,
        "batch_sequences": BATCH,
        "learning_rate": RATE,
        "held_out_sequences": held,
        **rig_settings(options, QUICK_SEEDS),
    }
    return Result(settings, rows, figures)


def _round(rig: Rig, steps: int, held: int) -> list[dict[str, Any]]:
    from connito.moe.background import background
    from connito.moe.resident import compress
    from connito.moe.rows import write_rows
    from connito.moe.statistics import collect
    from connito.moe.training import train_local

    tables = {domain: rig.held(domain, held) for domain in (TARGET, *GENERAL)}
    model = rig.model()
    before = {domain: mean_loss(model, table) for domain, table in tables.items()}
    selection = rig.select([TARGET], PER_LAYER, HELPERS)
    fewer = {layer: experts[: HELPERS - 1] for layer, experts in selection.helpers.items()}
    kinds: dict[str, dict[int, list[int]]] = {
        "complement": everything_else(selection.layers),
        f"{HELPERS} helpers": selection.helpers,
        f"{HELPERS - 1} helper": fewer,
        f"{HELPERS - 1} helper + background": fewer,
        "background": {},
        "targets only": {},
    }
    usage = {i: layer.token_score for i, layer in collect(model, rig.probe([TARGET], 8)[:, :-1]).layers.items()}
    batches = batched(rig.train(TARGET, steps * BATCH), BATCH)
    rows = []
    for mode, helpers in ARMS:
        # From the untouched base: `model` holds the rows that the arm before has trained.
        merged = background(rig.model(), selection, kinds[helpers], usage) if "background" in helpers else None
        worker = compress(rig.model(), selection, kinds[helpers], mode, merged)
        strayed = divergence(rig.model(), worker, tables[TARGET])
        state, stats = train_local(worker, batches, learning_rate=RATE)
        write_rows(model, selection, state)
        after = {domain: mean_loss(model, table) for domain, table in tables.items()}
        rows.append(
            {
                "seed": rig.seed,
                "arm": f"{mode}, {helpers}",
                "mass": selection.mass,
                "before": before[TARGET],
                "strayed": strayed,
                "target": after[TARGET],
                "elsewhere": statistics.fmean(after[d] - before[d] for d in GENERAL),
                "first_training_loss": stats.first_loss,
                "last_training_loss": stats.last_loss,
            }
        )
    return rows


def divergence(full: Any, compressed: Any, table: Tokens) -> float:
    """Return KL(full || compressed) of the next token, mean over the tokens of sequences [n, L + 1]."""
    import torch

    ids, total = torch.from_numpy(table[:, :-1].astype("int64")), 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), 16):
            part = ids[start : start + 16]
            p, q = (model(input_ids=part, use_cache=False).logits.log_softmax(-1) for model in (full, compressed))
            total += float((p.exp() * (p - q)).sum())
    return total / ids.numel()


if __name__ == "__main__":
    main("routing_modes", run, doc=__doc__, seeds=5)
