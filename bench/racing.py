"""Evaluation that racing saves a validator, and its cost in errors, on simulated submissions.

Each submission has a true effect on the target and on general text; a sequence's gain is that effect plus noise. The
same sequences are judged twice: by one look at the whole budget, and by racing. Kinds of submissions: honest work of
different quality, a change without any effect, one that harms the target, and one that helps the target and breaks
general text. A cycle of ten (six honest ones) shows how often the truly best one is ranked first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
from connito.protocol.scoring.proof_of_loss import RaceResult, race
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from numpy.random import Generator

from bench.harness import Options, Result, main, note

TOKENS = 256
BUDGET, GENERAL, FIRST, CONFIDENCE, MARGIN = 32, 16, 8, 0.95, 0.02
# Standard deviation of a sequence's gain, nats per token, on the target and on general text. Reports of real runs have
# 0.017 to 0.047 on the target and 0.0001 to 0.002 on general text (demo and tiny base, honest miners).
NOISE, GENERAL_NOISE = 0.04, 0.002
CYCLE = ("honest",) * 6 + ("nothing", "nothing", "harmful", "backdoor")

FIXED = run_pb2.ScorePolicy(
    target_sequences=BUDGET, general_sequences=GENERAL, confidence=CONFIDENCE, retention_margin=MARGIN
)
RACING = run_pb2.ScorePolicy(
    target_sequences=BUDGET, general_sequences=GENERAL, confidence=CONFIDENCE, retention_margin=MARGIN,
    minimum_sequences=FIRST,
)  # fmt: skip

# Kind -> (true effect on the target, true change of general loss), nats per token.
KINDS: dict[str, Callable[[Generator], tuple[float, float]]] = {
    "honest": lambda rng: (float(rng.uniform(0.02, 0.12)), 0.0),
    "weak": lambda rng: (float(rng.uniform(0.002, 0.02)), 0.0),
    "nothing": lambda rng: (0.0, 0.0),
    "harmful": lambda rng: (-0.05, 0.0),
    "backdoor": lambda rng: (0.1, 0.1),
}


def _losses(domain: str, gains: np.ndarray) -> list[cycle_pb2.SequenceLoss]:
    return [
        cycle_pb2.SequenceLoss(
            domain=domain, sequence=number, before=3.0 * TOKENS, after=(3.0 - float(gain)) * TOKENS, tokens=TOKENS
        )
        for number, gain in enumerate(gains)
    ]


def both(effect: float, change: float, rng: Generator) -> tuple[RaceResult, RaceResult]:
    """Judge one submission by one look at everything, and by racing, on the same sequences."""
    drawn = {
        "target": _losses("target", rng.normal(effect, NOISE, BUDGET)),
        "general": _losses("general", rng.normal(-change, GENERAL_NOISE, GENERAL)),
    }

    def judged(policy: run_pb2.ScorePolicy) -> RaceResult:
        return race(
            lambda look: {"target": drawn["target"][: look.target], "general": drawn["general"][: look.general]},
            "target",
            policy,
        )

    return judged(FIXED), judged(RACING)


def _sequences(raced: RaceResult) -> int:
    return raced.target.sequences + sum(domain.sequences for domain in raced.general.values())


def _kind(kind: str, count: int, rng: Generator) -> dict[str, object]:
    found = [both(*KINDS[kind](rng), rng) for _ in range(count)]
    return {
        "kind": kind,
        "races": count,
        "evaluated_share": round(statistics.fmean(_sequences(raced) / (BUDGET + GENERAL) for _, raced in found), 4),
        "passed_fixed": round(statistics.fmean(fixed.judgement.utility > 0 for fixed, _ in found), 4),
        "passed_racing": round(statistics.fmean(raced.judgement.utility > 0 for _, raced in found), 4),
    }


def _cycle(rng: Generator) -> dict[str, object]:
    """Simulate one cycle: the share evaluated, and whether the truly best useful submission came first."""
    truths = [KINDS[kind](rng) for kind in CYCLE]
    found = [both(*truth, rng) for truth in truths]
    best = max(range(len(CYCLE)), key=lambda i: truths[i][0] if CYCLE[i] == "honest" else -1.0)

    def first(of: int) -> bool:
        return max(range(len(CYCLE)), key=lambda i: found[i][of].judgement.utility) == best

    return {
        "share": statistics.fmean(_sequences(raced) / (BUDGET + GENERAL) for _, raced in found),
        "fixed": first(0),
        "racing": first(1),
        "bias": statistics.fmean(
            raced.judgement.utility - truth[0]
            for (_, raced), truth, kind in zip(found, truths, CYCLE, strict=True)
            if kind == "honest" and raced.judgement.reason == reasons_pb2.REASON_UNSPECIFIED
        ),
    }


def run(options: Options) -> Result:
    """Run `seeds` times 2,000 races of each kind and 300 cycles of ten; a tenth of it with --quick."""
    races, cycles = (200, 60) if options.quick else (2000, 300)
    rows, told = [], []
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        for kind in KINDS:
            rows.append({"seed": seed, **_kind(kind, races, rng)})
            note(f"seed {seed}, {kind}: {rows[-1]}")
        told += [_cycle(rng) for _ in range(cycles)]
    mean = {
        kind: {
            name: round(statistics.fmean(float(row[name]) for row in rows if row["kind"] == kind), 4)  # type: ignore[arg-type]
            for name in ("evaluated_share", "passed_fixed", "passed_racing")
        }
        for kind in KINDS
    }
    figures = {
        **{f"{kind}_{name}": value for kind, values in mean.items() for name, value in values.items()},
        "cycle_evaluated_share": round(statistics.fmean(float(row["share"]) for row in told), 4),  # type: ignore[arg-type]
        "best_is_first_fixed": round(statistics.fmean(bool(row["fixed"]) for row in told), 4),
        "best_is_first_racing": round(statistics.fmean(bool(row["racing"]) for row in told), 4),
        "honest_utility_bias": round(statistics.fmean(float(row["bias"]) for row in told), 5),  # type: ignore[arg-type]
    }
    settings = {
        "target_sequences": BUDGET, "general_sequences": GENERAL, "minimum_sequences": FIRST, "confidence": CONFIDENCE,
        "noise": NOISE, "general_noise": GENERAL_NOISE, "retention_margin": MARGIN,
    }  # fmt: skip
    return Result(settings, rows, figures)


if __name__ == "__main__":
    main("racing", run, doc=__doc__, seeds=3)
