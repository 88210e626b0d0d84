"""Rates over thousands of hand-ins: copies that are found, what they earn, and honest work that is accused.

A pool is a dozen honest miners of one tiny base, one world and one number of local steps, and what each kind of thief
makes of their work, all really trained and scored. A trial draws some honest miners and an order, lets the thief commit
last, and judges the cycle by the production rules. Pools are kept, so that a run can be taken up again and added to.

IID          everybody has text of its own from one domain
non-IID      a miner's text is from one of two domains
same text    everybody reads the same 32 sequences, each in an order of its own
few answers  everybody reads the same six sequences again and again
niche        everybody has text of its own from one domain but one, alone with another that the target has too; it is in
             every cycle, and the first victim of every theft

Bases and text are apart from those that the limits were found on: --calibration takes the domains that most of them come from.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.protocol.policy.choices import ADAMW, INNER_OPTIMIZERS, MUON
from connito.protocol.scoring import payout
from connito.protocol.scoring.copies import CopyEvidence
from connito.protocol.scoring.evaluation import Evaluation, score
from connito.protocol.scoring.functions import function_gram
from connito.protocol.scoring.own_work import OwnWork, own_work
from connito.v1 import artifacts_pb2, cycle_pb2, run_pb2

from bench.attack_arena import TARGET, Arena
from bench.compose_setup import base, text
from bench.harness import machine, note
from bench.tiny_rig import LENGTH, Rig, Tokens, batched
from bench.work_kinds import COPIES, PARTLY, Make, State

WORLDS, STEPS = ("IID", "non-IID", "same text", "few answers", "niche"), (8, 16)
MINERS, MADE, COMPANY, ORDERS = 12, 2, (3, 4, 6), 4
DISTINCT = {"same text": 32, "few answers": 6}
# The miner that is alone with its domain where one is, and what its own hand-ins are called.
NICHE, ALONE = 1, "honest, alone in its domain"
CALIBRATED_ON, MEASURED_ON = ("recipes", "logs"), ("poems", "ledgers")
EMISSION = 1_000_000
# Of the learning rate of the tiny profile; Muon's is that of `bench.decentralised`.
RATES = {ADAMW: 1.0, MUON: 4.0}
# Of the tiny base's pseudo-gradients, more than any company needs.
NUMBERS = 1 << 16


@dataclass
class Ground(Arena):
    """An arena whose target and text are of chosen domains; `world` is one of this module's."""

    target_domains: tuple[str, ...] = MEASURED_ON
    optimizer: str = ADAMW

    def policy(self) -> run_pb2.RunSpec:
        """Return the arena's policy, with this optimiser at its rate."""
        spec = super().policy()
        spec.training.optimizer = self.optimizer
        spec.training.learning_rate *= RATES[self.optimizer]
        return spec

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains that the target consists of."""
        return self.target_domains if self.world in ("non-IID", "niche") else self.target_domains[:1]

    @cached_property
    def held(self) -> dict[str, Tokens]:
        """Return held-out sequences by domain, the target first; the other domains are the general ones."""
        general = CALIBRATED_ON if self.target_domains == MEASURED_ON else MEASURED_ON
        target = np.concatenate([self.rig.held(domain, 96 // len(self.domains)) for domain in self.domains])
        return {TARGET: target, **{domain: self.rig.held(domain, 48) for domain in general}}

    def text(self, miner: int, steps: int, rng: np.random.Generator) -> Tokens:
        """Return a miner's batches [steps, B, L + 1]."""
        size = self.spec.training.batch_sequences
        if self.world not in DISTINCT:
            # An odd miner's text is of the second domain, where there are two.
            return self.shard(2 * miner if self.world == "niche" and miner != NICHE else miner, 1, steps)
        distinct = DISTINCT[self.world]
        rows = text(self.domains[0], distinct, 33_000 + self.rig.seed, LENGTH)
        order = [rng.permutation(distinct) for _ in range(-(-steps * size // distinct))]
        return batched(rows[np.concatenate(order)[: steps * size]], size)


@dataclass
class Pool:
    """The stock that trials draw from. Rows are works: `kind` of each, `victims` (rows that it is made of), cosines by the grams,
    the gains [rows, sequences] and the utility.
    """

    world: str
    steps: int
    seed: int
    kinds: list[str]
    victims: list[list[int]]
    weights: Any
    function: Any
    gains: Any
    utilities: list[float]


@dataclass(frozen=True)
class Trial:
    """One hand-in that was judged; `found` a copy, or honest work that is refused as one or paid nothing. `honest` is what the
    others of its cycle earned on average, `share` what it was paid of.
    """

    kind: str
    world: str
    work: str
    found: bool
    earned: float
    honest: float
    share: float = 1.0


def build(
    seed: int,
    world: str,
    steps: int,
    source: Path,
    folder: Path,
    domains: tuple[str, ...],
    kinds: Mapping[str, Make],
    optimizer: str = ADAMW,
) -> Pool:
    """Train and score one pool."""
    from connito.moe.state import load_state, save_state

    folder.mkdir(parents=True, exist_ok=True)
    ground = Ground(Rig(seed, source), world, folder, target_domains=domains, optimizer=optimizer)
    rng, standing = np.random.default_rng([seed, WORLDS.index(world), steps]), ground.start()
    theta, places = load_state(standing.state), itertools.count(MINERS)
    honest = [ground.train(standing.state, ground.text(miner, steps, rng)) for miner in range(MINERS)]

    def train(share: float, start: State | None) -> State:
        path = standing.state
        if start is not None:
            path = folder / "start-of-own-steps.safetensors"
            path.unlink(missing_ok=True)
            save_state(start, path)
        return ground.train(path, ground.text(next(places), max(1, round(share * steps)), rng))

    works: list[tuple[str, list[int], State]] = [("honest", [], state) for state in honest]
    for (name, make), _ in itertools.product(kinds.items(), range(MADE)):
        order = _with_niche(world, [int(place) for place in rng.permutation(MINERS)])[:3]
        made = make(theta, [honest[place] for place in order], train, rng)
        works.append((name if len(made) == 1 else f"{name}: first", order, made[0]))
        first = len(works) - 1
        works += [(name, [first, *order], one) for one in made[1:]]
    return _compared(ground, standing.state, works, steps)


def _with_niche(world: str, order: list[int]) -> list[int]:
    """Return an order with the miner of a domain of its own first, where there is one."""
    return sorted(order, key=lambda place: place != NICHE) if world == "niche" else order


def _compared(ground: Ground, base_state: Path, works: Sequence[tuple[str, list[int], State]], steps: int) -> Pool:
    from connito.moe.state import save_state
    from connito.workloads.scoring import SubmissionFiles

    bench, stop = ground.score_bench, threading.Event()
    drawn = bench.draw(bytes([ground.rig.seed % 256]) * 32)
    before = bench.incumbent(base_state, drawn, stop)
    paths, gains, utilities = [], [], []
    for place, (_, _, state) in enumerate(works):
        paths.append(ground.folder / f"work-{place}.safetensors")
        save_state(state, paths[-1])
        found = bench.submission(base_state, SubmissionFiles(paths[-1], None), drawn, before, stop, "it")
        scored = score(cycle_pb2.Submission(miner="it"), Evaluation(drawn, found, TARGET), ground.spec)
        gains.append([loss.before - loss.after for loss in scored.losses])
        utilities.append(scored.utility)
    bases = [base_state] * len(paths)
    weights, function = (
        gram_matrix(DeltaFiles(paths, bases)),
        function_gram(paths, bases, bytes([ground.rig.seed % 256]) * 32),
    )
    for path in paths:
        path.unlink()
    kinds, victims = [kind for kind, _, _ in works], [found for _, found, _ in works]
    return Pool(ground.world, steps, ground.rig.seed, kinds, victims, weights, function, np.array(gains), utilities)


def judge(pool: Pool, rows: Sequence[int], policy: run_pb2.ScorePolicy) -> tuple[OwnWork, list[int]]:
    """Return the judgement on rows in their order of commitment, named by their row, and what each earns."""
    names = [str(row) for row in rows]
    entries = [
        cycle_pb2.Submission(
            miner=name, commit_sequence=place, artifact=artifacts_pb2.ArtifactRef(digest=f"{place:064x}")
        )
        for place, name in enumerate(names, 1)
    ]
    gains = {
        name: {("", number): float(gain) for number, gain in enumerate(pool.gains[row])}
        for name, row in zip(names, rows, strict=True)
    }
    utilities = {name: pool.utilities[row] for name, row in zip(names, rows, strict=True)}
    useful = {name for name, utility in utilities.items() if utility > 0.0}
    block = np.ix_(list(rows), list(rows))
    evidence = CopyEvidence(pool.weights[block], {"V": gains}, {})
    found = own_work(entries, evidence, pool.function[block], policy, NUMBERS)
    ranked = sorted(
        (name for name in names if name in useful and name not in found.original), key=lambda name: -utilities[name]
    )
    units = payout.pay([utilities[name] for name in ranked], EMISSION, policy.paid_ranks, run_pb2.RewardPolicy())
    paid = dict(zip(ranked, units, strict=True))
    shares = {name: leaning.share for name, leaning in found.leaning.items()}
    return found, [round(paid.get(name, 0) * shares.get(name, 1.0)) for name in names]


def trials(pool: Pool, policy: run_pb2.ScorePolicy) -> Iterator[Trial]:
    """Yield what was judged: every honest hand-in in drawn orders, and each theft in drawn companies."""
    rng = np.random.default_rng([pool.seed, pool.steps, 5])
    for count, _ in itertools.product((*COMPANY, MINERS), range(ORDERS)):
        order = _with_niche(pool.world, [int(row) for row in rng.permutation(MINERS)])[:count]
        order = [int(row) for row in rng.permutation(order)] if pool.world == "niche" else order
        found, earned = judge(pool, order, policy)
        mean = float(np.mean(earned))
        for row, pay in zip(order, earned, strict=True):
            share = found.leaning[str(row)].share if str(row) in found.leaning else 1.0
            refused = str(row) in found.original or share == 0.0
            kind = ALONE if pool.world == "niche" and row == NICHE else "honest"
            yield Trial(kind, pool.world, f"{pool.seed} {pool.steps} {row}", refused, pay, mean, share)
    thieves = [row for row, kind in enumerate(pool.kinds) if kind != "honest" and not kind.endswith(": first")]
    for row, count in itertools.product(thieves, COMPANY):
        victims = pool.victims[row]
        others = [int(place) for place in rng.permutation(MINERS) if place not in victims]
        company = [int(place) for place in rng.permutation((victims + others)[: max(count, len(victims))])]
        found, earned = judge(pool, [*company, row], policy)
        mean = float(np.mean(earned[:-1]))
        name = f"{pool.seed} {pool.steps} {row}"
        yield Trial(pool.kinds[row], pool.world, name, str(row) in found.original, earned[-1], mean)


def rates(found: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return one row per kind and world. `earned` is what they got together over what honest miners got in the same cycles."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in found:
        groups.setdefault((trial.kind, trial.world), []).append(trial)
    return [
        {
            "kind": kind,
            "world": world,
            "hand_ins": len(group),
            "works": len({trial.work for trial in group}),
            "found": sum(trial.found for trial in group),
            "found_or_unpaid": sum(trial.found or trial.earned == 0 for trial in group),
            "earned": round(sum(trial.earned for trial in group) / max(1.0, sum(trial.honest for trial in group)), 3),
            "paid_in_part": sum(trial.share < 1.0 for trial in group),
            "share": round(float(np.mean([trial.share for trial in group])), 4),
        }
        for (kind, world), group in groups.items()
    ]


def _build(options: argparse.Namespace) -> None:
    """Build pools that are not there until the time is over."""
    end = time.monotonic() + 60 * options.minutes
    domains = CALIBRATED_ON if options.calibration else MEASURED_ON
    kinds = {} if options.honest else {**COPIES, **PARTLY}
    first, _, last = options.seeds.partition(":")
    for seed, steps, world in itertools.product(range(int(first), int(last)), STEPS, WORLDS):
        name = f"pool-{domains[0]}-{seed}-{world.replace(' ', '-')}-{steps}"
        kept = options.out / options.optimizer / f"{name}.pickle"
        if kept.exists() or time.monotonic() > end:
            continue
        note(f"base {seed}, {world}, {steps} steps")
        source = options.out / f"plain-{seed}"
        source = source if source.exists() else base(options.out, seed)
        kept.write_bytes(
            pickle.dumps(build(seed, world, steps, source, kept.parent / name, domains, kinds, options.optimizer))
        )


def main() -> None:
    """Read the command line and write `work_rates.json`."""
    import torch
    from connito.local.defaults import UpOptions, profile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="200:210", help="FIRST:LAST, bases that are built")
    parser.add_argument("--minutes", type=float, default=60.0, help="build no further pool after this long")
    parser.add_argument(
        "--honest", action="store_true", help="pools of honest work alone, which take a tenth of the time"
    )
    parser.add_argument("--calibration", action="store_true", help="the domains that the limits were found on")
    parser.add_argument("--optimizer", choices=INNER_OPTIMIZERS, default=ADAMW, help="whose local steps miners take")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of pools and of the result, one below for each optimizer"
    )
    options = parser.parse_args()
    (options.out / options.optimizer).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    policy = profile(UpOptions(base="tiny").checked()).spec.scoring
    _build(options)
    pools = [
        pickle.loads(path.read_bytes()) for path in sorted((options.out / options.optimizer).glob("pool-*.pickle"))
    ]
    rows = rates([trial for pool in pools for trial in trials(pool, policy)])
    settings = {
        "pools": len(pools),
        "bases": len({pool.seed for pool in pools}),
        "steps": list(STEPS),
        "domains": list(CALIBRATED_ON if options.calibration else MEASURED_ON),
        "company": list(COMPANY),
        "optimizer": options.optimizer,
    }
    document = {"machine": machine(), "settings": settings, "rows": rows}
    (options.out / options.optimizer / "work_rates.json").write_text(json.dumps(document, indent=1))
    note(f"{len(pools)} pools, {sum(row['hand_ins'] for row in rows)} hand-ins judged")


if __name__ == "__main__":
    main()
