"""Success of lying validators: how often they reward a friend or harm a rival, and their weight and reward.

Validators of equal stake judge six honest miners and a friend of the liars whose work is worth nothing. Honest ones claim
the true utilities, up to what two kinds of processors differ by; liars together grant the friend more than anybody, and
nothing to the best. Consensus, trust, bonds, ranks and rewards are the production functions, over cycles of one run;
every seed assigns anew. With trust off every vote always weighs its stake.
"""

from __future__ import annotations

import statistics
from itertools import product

import numpy as np
from connito.protocol.assignment import assign
from connito.protocol.scoring.consensus import consensus
from connito.protocol.scoring.trust import votes
from connito.protocol.scoring.verdicts import score_cycle
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey
from numpy.random import Generator

from bench.harness import Options, Result, main, note

RUN, FRIEND, EMISSION = "bench", "friend", 1_000_000
MINERS = [f"miner-{number}" for number in range(6)]
# (validators, liars), and how many score each submission; 0 is all.
CROWDS = ((3, 1), (5, 1), (5, 2))
DUTIES = (0, 3, 2)
# Relative difference of a loss between processors.
NOISE = 1e-4


def _facts(rate: float) -> RunFacts:
    rewards = run_pb2.RewardPolicy(payout="proportional", bond_rate=rate, validator_share=0.1)
    spec = run_pb2.RunSpec(run=RUN, cycles=1000, emission=EMISSION, rewards=rewards)
    spec.scoring.paid_ranks = 100
    facts = RunFacts(RUN)
    _put(facts, "run", 0, "created", run_pb2.RunCreated(spec=spec))
    return facts


def _put(
    facts: RunFacts, section: str, cycle: int, kind: str, message: run_pb2.RunCreated | cycle_pb2.CycleScored
) -> None:
    facts.add(Fact(RUN, FactKey(section, cycle, kind, ""), message, "", section, cycle + 1, 0))


def _claim(truth: dict[str, float], best: str, lies: bool, rng: Generator) -> dict[str, float]:
    if lies:
        return {**truth, FRIEND: 1.5 * truth[best], best: 0.0}
    return {miner: utility * float(1 + NOISE * rng.standard_normal()) for miner, utility in truth.items()}


def _cycle(
    facts: RunFacts, cycle: int, names: list[str], liars: set[str], each: int, rng: Generator
) -> dict[str, float]:
    """Simulate one cycle of the run and return the liars' gain."""
    truth = {**{miner: float(rng.uniform(0.02, 0.2)) for miner in MINERS}, FRIEND: 0.0}
    best = max(truth, key=truth.__getitem__)
    entries = [cycle_pb2.Submission(miner=miner, commit_sequence=i) for i, miner in enumerate(truth, 1)]
    duties = assign(rng.bytes(32), truth, names, each)
    reports = []
    for name in names:
        claims = _claim(truth, best, name in liars, rng)
        scores = [cycle_pb2.SubmissionScore(miner=miner, utility=claims[miner]) for miner in sorted(duties[name])]
        reports.append(cycle_pb2.ScoreReport(validator=name, scores=scores))
    weight = votes(facts, cycle, lambda _: 1.0)
    stakes = {name: weight(name) for name in names}
    agreed = consensus(reports, stakes, submissions=entries, assigned=duties)
    for standing in agreed.standings:
        standing.weight = stakes[standing.validator]
    scored = score_cycle(facts, cycle, entries, agreed, {}, {}, {})
    _put(facts, "merge", cycle, "scored", scored)
    pay = sum(standing.reward for standing in scored.validators)
    lying = sum(standing.reward for standing in scored.validators if standing.validator in liars)
    return {
        "friend_granted": float(agreed.utilities[FRIEND] > 0),
        "best_sunk": float(agreed.utilities[best] == 0),
        "friend_reward": next(v.reward for v in scored.verdicts if v.miner == FRIEND) / EMISSION,
        "liars_weight": statistics.fmean(stakes[name] for name in liars),
        "honest_weight": statistics.fmean(stakes[name] for name in names if name not in liars),
        "liars_pay": lying / pay if pay else 0.0,
    }


def _simulate(crowd: tuple[int, int], each: int, rate: float, cycles: int, seed: int) -> dict[str, object]:
    validators, lying = crowd
    names = [f"validator-{number}" for number in range(validators)]
    rng, facts, liars = np.random.default_rng(seed), _facts(rate), set(names[:lying])
    told = [_cycle(facts, cycle, names, liars, each, rng) for cycle in range(1, cycles + 1)]

    def mean(name: str) -> float:
        return round(statistics.fmean(row[name] for row in told), 4)

    return {
        "validators": validators, "liars": lying, "each": each or validators, "trust": rate > 0, "seed": seed,
        "friend_granted": mean("friend_granted"), "best_sunk": mean("best_sunk"), "friend_reward": mean("friend_reward"),
        "liars_weight_after_10": round(told[min(10, cycles - 1)]["liars_weight"], 4),
        "liars_weight_last": round(told[-1]["liars_weight"], 4),
        "honest_weight_last": round(told[-1]["honest_weight"], 4),
        "liars_pay_last": round(told[-1]["liars_pay"], 4), "liars_stake": round(lying / validators, 4),
    }  # fmt: skip


def run(options: Options) -> Result:
    """Make `seeds` runs of each setting."""
    cycles = 20 if options.quick else 60
    rows = []
    for crowd, each, rate in product(CROWDS, DUTIES, (0.0, 0.1)):
        if each >= crowd[0]:
            continue
        rows += [_simulate(crowd, each, rate, cycles, seed) for seed in range(options.seeds)]
        note(f"{crowd[1]} of {crowd[0]} lie, {each or crowd[0]} score each, rate {rate}: {rows[-1]}")
    figures = {}
    for row in rows:
        if row["seed"] == 0:
            same = [r for r in rows if all(r[k] == row[k] for k in ("validators", "liars", "each", "trust"))]
            name = f"{row['liars']}_of_{row['validators']}_each_{row['each']}_{'trust' if row['trust'] else 'stake'}"
            figures[name] = {
                key: round(statistics.fmean(float(str(r[key])) for r in same), 3)
                for key in ("friend_granted", "best_sunk", "friend_reward", "liars_weight_last", "honest_weight_last",
                            "liars_pay_last")
            }  # fmt: skip
    return Result({"cycles": cycles, "noise": NOISE, "miners": len(MINERS)}, rows, figures)


if __name__ == "__main__":
    main("trust", run, doc=__doc__, seeds=5)
