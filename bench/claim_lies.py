"""Lies about routed tokens: which are found when they are counted again, and what the others do to a merge.

Four miners of one domain each make one cycle's steps, and one of them lies, or two. A liar's rows are worthless: noise as
long as an honest pseudo-gradient, which validators are taken to have let pass, so that all that holds it back is its weight.
`share` is the liars' mean share of the merge over experts, and `most` the largest of one expert; `rise` by how much the loss
after the merge is above that of the same merge with the true claim, in nats per token. `judged` is by how much a liar's own
state raises it as validators measure it, by what the liar claims: what is not above zero would not have been refused.
The base's experts differ, and miners hold two frozen helpers a layer beside the selected ones, so that honest claims differ
from what the full model counts: `apart` by this share of a layer's tokens, at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from connito.protocol.claims import CLAIMED_TOKENS, MARGIN, claimed_rows, counts_of, falsehood, margin
from connito.protocol.merging.aggregators import aggregate, plan_by_expert
from connito.protocol.merging.by_expert import judged, of_equal_mass

from bench.decentralised import loss_of, shards_of, tensors
from bench.decentralised_cells import DOMAINS, PER_LAYER
from bench.harness import Options, Result, main, note
from bench.merging import StateDeltas
from bench.tiny_rig import LENGTH, Rig, rig_settings, rigs, spread

MINERS, STEPS, RATE, QUICK_SEEDS = 4, 8, 4e-3, 1
Claim = dict[int, list[int]]
Lie = Callable[[Claim, int], Claim | None]


def _all(value: Callable[[int, int], int]) -> Lie:
    return lambda claim, tokens: {
        layer: [min(tokens, value(n, tokens)) for n in counts] for layer, counts in claim.items()
    }


def _moved(claim: Claim, tokens: int) -> Claim:
    """Claim everything for the expert that is used least."""
    return {
        layer: [sum(counts) if place == counts.index(min(counts)) else 0 for place in range(len(counts))]
        for layer, counts in claim.items()
    }


def _unseen(claim: Claim, tokens: int) -> Claim:
    """Add to the least used expert of each layer what the margin leaves."""
    return {
        layer: [n + int(margin(at) * tokens) - 1 if n == min(counts) else n for n in counts]
        for at, (layer, counts) in enumerate(sorted(claim.items()))
    }


LIES: Mapping[str, Lie] = {
    "inflated to all tokens": _all(lambda n, tokens: tokens),
    "inflated × 2": _all(lambda n, _: 2 * n),
    "inflated × 1.1": _all(lambda n, _: round(1.1 * n)),
    "deflated to nothing": _all(lambda n, _: 0),
    "halved": _all(lambda n, _: n // 2),
    "all for the least used expert": _moved,
    "as much as is not seen, for the least used": _unseen,
    "no claim": lambda *_: None,
}
WEIGHTINGS = ("tokens", "capped")


def run(options: Options) -> Result:
    """Try every lie by one miner and by two, on one base a seed."""
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS, expert_steps=32) as each:
        for rig in each:
            rows += _tried(rig)
    figures: dict[str, Any] = {}
    for key in dict.fromkeys((row["lie"], row["liars"], row["weighting"]) for row in rows):
        group = [row for row in rows if (row["lie"], row["liars"], row["weighting"]) == key]
        figures[f"{key[0]}, {key[1]} of {MINERS}, {key[2]}"] = {
            "found": f"{sum(row['found'] for row in group)} of {sum(row['liars'] for row in group)}",
            **{name: spread([row[name] for row in group], 3) for name in ("share", "most", "rise", "judged")},
        }
    figures["honest claims apart at most"] = max(row["apart"] for row in rows)
    settings = {
        "miners": MINERS,
        "local_steps": STEPS,
        "rate": RATE,
        "margin": MARGIN,
        "claimed_tokens": CLAIMED_TOKENS,
    }
    return Result({**settings, **rig_settings(options, QUICK_SEEDS)}, rows, figures)


def _tried(rig: Rig) -> list[dict[str, Any]]:
    from connito.moe.evaluate import Evaluator
    from connito.moe.resident import compress, write_targets
    from connito.moe.routed import routed_tokens
    from connito.moe.training import train_local
    from connito.workloads.scoring import rebase

    selection = rig.select(DOMAINS, PER_LAYER)
    evaluator = Evaluator(rig.model(), selection)
    held = np.concatenate([rig.held(domain, 12) for domain in DOMAINS])
    model = compress(rig.model(), selection, selection.helpers)
    cycle = shards_of(rig, MINERS, STEPS, iid=False, total=STEPS, batch=8)[0]
    claims, counted, states = [], [], []
    evaluator.restore()
    for batches in cycle:
        write_targets(model, evaluator.base)
        claims.append(routed_tokens(model, selection, claimed_rows(batches)))
        counted.append(routed_tokens(evaluator.model, selection, claimed_rows(batches)))
        states.append(train_local(model, batches, learning_rate=RATE)[0])
    tokens = len(claimed_rows(cycle[0])) * LENGTH
    apart = max(
        sum(abs(a - b) for a, b in zip(mine[layer], true[layer], strict=True)) / tokens
        for mine, true in zip(claims, counted, strict=True)
        for layer in mine
    )
    theta = {name: rows.numpy() for name, rows in evaluator.base.items()}
    of_target = _use(routed_tokens(evaluator.model, selection, rig.probe(DOMAINS, 8)))
    before = loss_of(evaluator, evaluator.base, held)
    rows: list[dict[str, Any]] = []
    for liars in (1, 2):
        handed = _with_noise(theta, states, liars, rig.seed)

        def outcome(
            told: list[Claim | None], weighting: str, handed: Any = handed, liars: int = liars
        ) -> dict[str, float]:
            counts = counts_of(told)
            counts = of_equal_mass(counts) if weighting == "capped" else counts
            deltas = StateDeltas(theta, handed)
            how = plan_by_expert("mean", [1.0] * MINERS, [0] * MINERS, counts, use=of_target)
            merged = {name: (theta[name] - aggregate(how, deltas, name)).astype(np.float32) for name in theta}
            most = max(float(of.weights[:liars].sum(axis=0).max()) for of in how.experts.values())
            loss = loss_of(evaluator, tensors(merged), held)
            strength = {layer: rows[0] for layer, rows in judged(told, of_target).items()}
            alone = loss_of(evaluator, rebase(handed[0], evaluator.base, evaluator.base, strength), held)
            return {"share": sum(how.weights[:liars]), "most": most, "loss": loss, "judged": alone - before}

        for weighting in WEIGHTINGS:
            honest = outcome(list(claims), weighting)
            for name, lie in LIES.items():
                note(f"seed {rig.seed}, {weighting}: {name}, {liars}")
                said = [lie(claim, tokens) if place < liars else claim for place, claim in enumerate(claims)]
                found = sum(
                    claim is not None and falsehood(claim, true, tokens) is not None
                    for claim, true in zip(said[:liars], counted[:liars], strict=True)
                )
                got = outcome(said, weighting)
                rise = got.pop("loss") - honest["loss"]
                common = {"seed": rig.seed, "lie": name, "liars": liars, "weighting": weighting, "apart": apart}
                rows.append({**common, "found": found, **got, "rise": rise, "honest_share": honest["share"]})
    return rows


def _use(counted: Claim) -> dict[int, Any]:
    return {layer: counts[0] for layer, counts in counts_of([counted]).items()}


def _with_noise(theta: Any, states: Any, liars: int, seed: int) -> Any:
    """Return the states, the first ones replaced by noise as long as what they were."""
    import torch

    rng = np.random.default_rng([seed, 15])
    noisy = []
    for state in states[:liars]:
        drawn = {name: rng.standard_normal(rows.shape, dtype=np.float32) for name, rows in theta.items()}
        scale = {
            name: float(np.linalg.norm(theta[name] - state[name].numpy())) / float(np.linalg.norm(drawn[name]))
            for name in theta
        }
        noisy.append({name: torch.from_numpy(theta[name] + drawn[name] * np.float32(scale[name])) for name in theta})
    return [*noisy, *states[liars:]]


if __name__ == "__main__":
    main("claim_lies", run, doc=__doc__, seeds=5)
