"""The claim that started it: a domain gains over many cycles, general text stays, and many miners do what one machine does.

Domain: sums of numbers, generated; `exact` is the share of answers that are right to the last token, with the answers before
them for examples. General: held-out text of the base's other domains, of which one
sequence in four of every batch is, as in jobs. Miners share the text out and merge by the default
policy in cycles of a few steps; everything else trains on the same tokens, as many steps, each on the batches of all miners:
the same experts in one place, ESFT by its own rule, LoRA over ranks and targets, and every parameter, each over rates. Rates
are chosen with the reported text, which favours whoever has more of them; so the miners, with one, are not favoured.

Two bases: `tiny`, half a million parameters and bytes for words, and `demo`, SmolLM2-135M with copied experts. Each arm of a
seed is kept in a file of its own, and so is the state of a run of miners after each cycle: what is stopped goes on. `--only`
names parts: `tiny miners`, say, or whole arms by the names of their files. Seeds were named before the first run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from connito.protocol.policy.choices import ADAMW, MUON

from bench.harness import Options, Result, gpu_name, interval, main, note
from bench.local_work import Miner
from bench.merging import Merge, merged
from bench.plots import axes
from bench.tiny_rig import Tokens, mean_loss
from bench.training_methods import Job, Loop, everything_but, expert_only, full_fine_tuning, lora

SEEDS = (5101, 5102, 5103, 5104, 5105)
MINERS, LENGTH, HELD = 3, 64, 32
# Offsets of seeds above it are of held-out text.
HELD_OUT = 5000


@dataclass(frozen=True)
class Size:
    """Sizes for a base: sums are of numbers below `below`, cycles of `steps` batches of `batch` sequences a miner."""

    below: int
    cycles: int
    steps: int
    batch: int
    general: tuple[str, ...]
    # A miner's of AdamW and of Muon.
    rate: float
    muon: float
    rates: Mapping[str, tuple[float, ...]]
    ranks: tuple[int, ...]


EXPERT_RATES, LORA_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2), (1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (1e-3, 3e-3, 1e-2)
TINY_RATES = {"expert-only": EXPERT_RATES, "ESFT": EXPERT_RATES, "LoRA": LORA_RATES, "full": FULL_RATES}
DEMO_EXPERT_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
DEMO_RATES = {
    "expert-only": DEMO_EXPERT_RATES,
    "ESFT": DEMO_EXPERT_RATES,
    "LoRA": (1e-4, 3e-4, 1e-3, 3e-3),
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
}
# Of the demo base the rates are the demo's own, and of Muon the best of a sweep there, on another domain.
SIZES = {
    "tiny": Size(10, 20, 4, 4, ("recipes", "logs", "poems", "ledgers"), 8e-3, 3.2e-2, TINY_RATES, (4, 16, 64)),
    "demo": Size(100, 20, 2, 4, ("code", "legal"), 4e-4, 3.2e-3, DEMO_RATES, (4, 16, 64)),
}


def run(options: Options) -> Result:
    """Measure the arms that are not there yet, of those named by `only`, and gather all that are."""
    import torch

    torch.set_num_threads(1)
    seeds = SEEDS[:1] if options.quick else SEEDS[: options.seeds]
    folder = options.out / ("pilot-quick" if options.quick else "pilot-arms")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(base, seed, arm) for base in SIZES for seed in seeds for arm in arms(SIZES[base])]
    if options.quick:
        wanted = [(base, seed, arm) for base, seed, arm in wanted if base == "tiny" and arm in ("miners", "central")]
    pilots: dict[tuple[str, int], Pilot] = {}
    words = options.only.split()
    for base, seed, arm in wanted:
        path = folder / f"{base}-{seed}-{arm.replace(' ', '_')}.json"
        if path.exists() or not (path.stem in words or all(word in (base, str(seed), *arm.split()) for word in words)):
            continue
        if (base, seed) not in pilots:
            pilots = {(base, seed): Pilot(base, seed, folder)}
        note(f"{base}, seed {seed}: {arm}")
        row = {"base": base, "seed": seed, "arm": arm, **pilots[base, seed].measure(arm, path.with_suffix(".state"))}
        row["gpu"] = gpu_name()
        path.write_text(json.dumps(row) + "\n")
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [row for row in rows if row["seed"] in seeds]
    _plot(rows, options.out)
    names = " ".join(f"{row['base']}-{row['seed']}-{row['arm'].replace(' ', '_')}" for row in rows)
    settings = {"in_parts": True, "only": names, "seeds": len({row["seed"] for row in rows}),
                "seeds_named": SEEDS, "miners": MINERS, "length": LENGTH,
                "held_out_sequences": HELD,
                "sizes": {base: vars(size) for base, size in SIZES.items()}, "torch_threads": 1}  # fmt: skip
    return Result(settings, rows, figures(rows))


# Arms with cycles, of miners or of one machine, by the optimiser of their steps.
CYCLES = {"miners": ADAMW, "central": ADAMW, "miners by Muon": MUON, "central by Muon": MUON}


def arms(size: Size) -> Iterator[str]:
    """Yield the arms, miners and one machine first."""
    yield from CYCLES
    for method, rates in size.rates.items():
        for rate in rates:
            if method == "LoRA":
                yield from (f"LoRA {kind} {rank} {rate:g}" for kind in ("experts", "attention") for rank in size.ranks)
            else:
                yield f"{method} {rate:g}"


class Sums:
    """Generated sums as rows of tokens, and which of their tokens are answers."""

    def __init__(self, tokenizer: Any, below: int) -> None:
        self._tokenizer, self._below = tokenizer, below

    def rows(self, seed: int, count: int) -> tuple[Tokens, Tokens]:
        """Return ids [count, L + 1], and for each the number from 1 of the sum whose answer it is a token of, or 0."""
        rng = np.random.default_rng(seed)
        ids, answers = np.zeros((count, LENGTH + 1), np.int32), np.zeros((count, LENGTH + 1), np.int32)
        for row in range(count):
            tokens: list[int] = []
            marks: list[int] = []
            number = 0
            while len(tokens) <= LENGTH:
                a, b = (int(x) for x in rng.integers(self._below, size=2))
                number += 1
                question, answer = self._encoded(f"{a}+{b}="), self._encoded(f"{a + b}\n")
                tokens += question + answer
                whole = len(tokens) <= LENGTH + 1
                marks += [0] * len(question) + [number if whole else 0] * len(answer)
            ids[row], answers[row] = tokens[: LENGTH + 1], marks[: LENGTH + 1]
        return ids, answers

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def exact(model: Any, ids: Tokens, answers: Tokens) -> float:
    """Return the share of answers that greedy decoding gives to the last token, each after what stands before it.

    Decoding follows the right answer as long as each of its tokens is the most likely one, so one forward pass tells.
    """
    import torch

    table, right, asked = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device), 0, 0
    with torch.inference_mode():
        likely = [model(input_ids=part[:, :-1], use_cache=False).logits.argmax(-1) for part in torch.split(table, 8)]
        for hits, marks in zip((torch.cat(likely) == table[:, 1:]).cpu().numpy(), answers[:, 1:], strict=True):
            numbers = [n for n in np.unique(marks) if n > 1]  # The first has no example before it.
            asked += len(numbers)
            right += sum(bool(hits[marks == n].all()) for n in numbers)
    return right / max(1, asked)


class Pilot:
    """A base with its experts chosen by sums, and what is measured."""

    def __init__(self, base: str, seed: int, folder: Path) -> None:
        from connito.base.loading import load_tokenizer
        from connito.moe.evaluate import Evaluator

        self.name, self.seed, self.size, self._folder = base, seed, SIZES[base], folder
        self.sums = Sums(load_tokenizer(self.source), self.size.below)
        self.held, self.answers = self.sums.rows(9000 + seed, HELD)
        self.selection = self.chosen("esft-token", 1.0, 3 if base == "tiny" else 2)
        self.evaluator = Evaluator(self.load(), self.selection)
        self.general, self._replay = self._general(HELD, 9000), self._general(400, 2000)

    @cached_property
    def source(self) -> Path:
        """Return the folder of the base; the tiny one is a seed's own."""
        from connito.base.recipes import build_cached

        from bench.compose_setup import base

        if self.name == "demo":
            return build_cached("demo", lambda *_: None) / "model"
        return base(self._folder, self.seed)

    def load(self) -> Any:
        """Return a fresh full model, on the GPU where there is one, with the family's own loop over experts."""
        return copy.deepcopy(self._whole)

    @cached_property
    def _whole(self) -> Any:
        from connito.base.loading import load_full
        from connito.moe.device import device_of

        return load_full(self.source).to(device_of())

    def chosen(self, method: str, threshold: float, per_layer: int = 0) -> Any:
        """Return the experts that sums use, by a method; at most `per_layer`."""
        from connito.moe.budget import Budget
        from connito.moe.selection import select_experts
        from connito.moe.statistics import collect

        probe, _ = self.sums.rows(6000 + self.seed, 16)
        budget = Budget(per_layer, scope="layer") if per_layer else None
        found = collect(self.load(), probe[:, :-1])
        return select_experts(found, method, threshold, budget=budget, helpers_per_layer=2, domain="sums")

    def _general(self, count: int, offset: int) -> Tokens:
        """Return rows of the other domains, drawn apart for each offset."""
        from connito.base.loading import load_tokenizer
        from connito.data.domains import load_domain

        from bench.compose_setup import text

        each = count // len(self.size.general)
        if self.name == "tiny":
            return np.concatenate([text(domain, each, offset + self.seed) for domain in self.size.general])
        rows, tokenizer, rng = [], load_tokenizer(self.source), np.random.default_rng(offset + self.seed)
        for domain in self.size.general:
            ids = tokenizer("\n".join(load_domain(domain, 400_000)))["input_ids"]
            half = len(ids) // 2
            starts = rng.integers(half - LENGTH - 1, size=each) + half * (offset > HELD_OUT)
            rows += [ids[start : start + LENGTH + 1] for start in starts]
        return np.asarray(rows, np.int32)

    def batches(self) -> Tokens:
        """Return [cycles, miners, H, B, L + 1], the same for every arm."""
        size = self.size
        shape = (size.cycles, MINERS, size.steps, size.batch, LENGTH + 1)
        made = self.sums.rows(2000 + self.seed, int(np.prod(shape[:-1])))[0].reshape(shape)
        drawn = np.random.default_rng(self.seed).integers(len(self._replay), size=shape[:3])
        made[..., 0, :] = self._replay[drawn]
        return made

    def judged(self, model: Any) -> dict[str, float]:
        """Return losses in nats per token, and the share of exact answers."""
        return {"sums": mean_loss(model, self.held), "general": mean_loss(model, self.general),
                "exact": exact(model, self.held, self.answers)}  # fmt: skip

    @cached_property
    def _before(self) -> dict[str, float]:
        return self.judged(self._whole)

    def measure(self, arm: str, kept: Path) -> dict[str, Any]:
        """Return what an arm comes to, after each cycle where it has cycles. kept: where its state is between them."""
        if arm in CYCLES:
            rate = self.size.muon if CYCLES[arm] == MUON else self.size.rate
            together = arm.startswith("central")
            return {"rate": rate, "cycles": self._cycles(kept, CYCLES[arm], rate, together=together)}
        before, (job, rate) = self._before, self._job(arm)
        loop = Loop(job, rate)
        for batch in self.batches().swapaxes(1, 2).reshape(-1, MINERS * self.size.batch, LENGTH + 1):
            loop.step(batch)
        return {"rate": rate, "cycles": [before, self.judged(job.full())], "numbers": job.upload()}

    def _job(self, arm: str) -> tuple[Job, float]:
        method, *rest = arm.split()
        if method == "full":
            return full_fine_tuning(self.load), float(rest[0])
        if method == "LoRA":
            modules = ("q_proj", "k_proj", "v_proj", "o_proj") if rest[0] == "attention" else ()
            return lora(self.load, int(rest[1]), modules=modules), float(rest[2])
        chosen = self.selection if method == "expert-only" else self.chosen("esft-token", 0.2)
        return expert_only(self.load, chosen.layers, everything_but(self.load(), chosen.layers)), float(rest[0])

    def _cycles(self, kept: Path, inner: str, rate: float, *, together: bool) -> list[dict[str, float]]:
        """Return what is measured before the first cycle and after each one; of one machine, of all batches side by side."""
        import torch
        from connito.moe.moments import Moments
        from connito.moe.resident import compress
        from connito.moe.routed import routed_tokens
        from connito.moe.rows import write_rows
        from connito.protocol.claims import claimed_rows
        from connito.protocol.policy.law import DEFAULTS

        how, second = Merge.default(), DEFAULTS.training.moments == "second"
        betas = (0.9, 0.95) if together else (DEFAULTS.training.beta1, 0.95)
        theta, outer = {name: rows.numpy() for name, rows in self.evaluator.base.items()}, None
        count = 1 if together else MINERS
        workers = [Miner(inner, Moments(second_only=second and not together), betas) for _ in range(count)]
        whole = self.load()
        found, begun = [self.judged(whole)], 0
        if kept.exists():
            begun, theta, outer, workers, found = torch.load(kept, weights_only=False)
        model = compress(self.load(), self.selection, everything_but(whole, self.selection.layers))
        for number, cycle in list(enumerate(self.batches()))[begun:]:
            start = {name: torch.from_numpy(rows) for name, rows in theta.items()}
            shares = cycle.swapaxes(0, 1).reshape(1, len(cycle[0]), -1, LENGTH + 1) if together else cycle
            states = [w.work(model, start, own, rate) for w, own in zip(workers, shares, strict=True)]
            if together:
                theta = {name: rows.numpy() for name, rows in states[0].items()}
            else:
                write_rows(whole, self.selection.layers, start)
                routed = [routed_tokens(whole, self.selection, claimed_rows(own)) for own in shares]
                theta, outer = merged(how, theta, outer, states, [1.0] * MINERS, routed, [w.moments for w in workers])
            write_rows(whole, self.selection.layers, {name: torch.from_numpy(rows) for name, rows in theta.items()})
            found.append(self.judged(whole))
            note(f"  cycle {number + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in found[-1].items()))
            torch.save((number + 1, theta, outer, workers, found), kept)
        kept.unlink(missing_ok=True)
        return found


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return per base and arm [mean, low, high, seeds] of what changed, and of the cycles in which the loss of sums fell."""
    found: dict[str, Any] = {}
    for base, arm in dict.fromkeys((row["base"], row["arm"]) for row in rows):
        mine = [row["cycles"] for row in rows if (row["base"], row["arm"]) == (base, arm)]
        for what in ("sums", "general", "exact"):
            changes = [cycles[-1][what] - cycles[0][what] for cycles in mine]
            found[f"{base}, {arm}: {what}"] = [*(round(x, 4) for x in interval(changes)), len(mine)]
        found[f"{base}, {arm}: exact before"] = round(float(np.mean([cycles[0]["exact"] for cycles in mine])), 4)
        if len(mine[0]) > 2:
            fell = [float(np.mean(np.diff([at["sums"] for at in cycles]) < 0)) for cycles in mine]
            found[f"{base}, {arm}: cycles in which it fell"] = round(float(np.mean(fell)), 4)
    for base, by in ((base, by) for base in SIZES for by in ("", " by Muon")):
        ends = {
            arm: {r["seed"]: r["cycles"] for r in rows if (r["base"], r["arm"]) == (base, f"{arm}{by}")}
            for arm in ("miners", "central")
        }
        both = sorted(ends["miners"].keys() & ends["central"].keys())
        gains = {arm: [ends[arm][s][0]["sums"] - ends[arm][s][-1]["sums"] for s in both] for arm in ends}
        if both:
            kept = [one / other for one, other in zip(gains["miners"], gains["central"], strict=True)]
            found[f"{base}: kept of central{by}"] = [*(round(x, 4) for x in interval(kept)), len(both)]
    return found


def _plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    shown = [row for row in rows if row["arm"] in ("miners", "central")]
    bases = [base for base in SIZES if any(row["base"] == base for row in shown)]
    if not bases:
        return
    with axes(out / "pilot.svg", len(bases)) as panels:
        for panel, base in zip(panels, bases, strict=True):
            for arm, colour in (("miners", "#0b6e99"), ("central", "#8a8a8a")):
                mine = [[at["sums"] for at in r["cycles"]] for r in shown if (r["base"], r["arm"]) == (base, arm)]
                if mine:
                    panel.line(list(enumerate(np.mean(mine, axis=0).tolist())), colour, arm)
            panel.title, panel.x_label, panel.y_label = base, "cycles", "held-out loss of sums, nats per token"


if __name__ == "__main__":
    main("pilot", run, doc=__doc__, seeds=len(SEEDS))
