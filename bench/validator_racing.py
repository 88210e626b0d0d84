"""Judging trained submissions, with and without a race: part of `bench.validator_throughput`.

The whole budget of a policy is 64 target sequences on the tiny base (32 in a quick run and on the demo base) and a quarter
as many of each general domain. Without racing, every submission is evaluated on all of it by copying the model and
running it whole. With racing, rows are swapped, the frozen prefix is cached, and evaluation stops at the look that
decides, at the same error level.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.compose_setup import base, text, train
from bench.tiny_rig import Tokens

TARGET, GENERAL = "recipes", ("logs", "poems", "ledgers")
LENGTH, HONEST, STEPS, PER_LAYER = 128, 6, 6, 2


@dataclass(frozen=True)
class Case:
    """A base, the experts that were adapted, the states that miners submitted, and held-out sequences, the target first."""

    model: Any
    layers: dict[int, list[int]]
    states: list[Any]
    held: dict[str, Tokens]


def race_round(case: Case) -> dict[str, Any]:
    """Measure submissions a minute of processor time either way, the share of the budget that a race reads, whether
    verdicts agree.
    """
    model, layers, states, held = case.model, case.layers, case.states, case.held
    whole_seconds, whole = _timed(lambda: _whole(model, layers, states, held))
    raced_seconds, (raced, read) = _timed(lambda: _raced(model, layers, states, held))
    budget = sum(map(len, held.values())) * len(states)
    return {
        "submissions": len(states),
        "per_minute_whole_copy": 60 * len(states) / whole_seconds,
        "per_minute_raced": 60 * len(states) / raced_seconds,
        "times_faster": whole_seconds / raced_seconds,
        "share_of_sequences_read": read / budget,
        "verdicts_agree": sum(a == b for a, b in zip(whole, raced, strict=True)) / len(states),
        "useful": sum(reason == 0 for reason in whole),
    }


def tiny_case(seed: int, sequences: int) -> Case:
    """Return the tiny case: six honest miners, one that trained on another domain, one that sent noise."""
    from connito.base.loading import load_full

    with tempfile.TemporaryDirectory() as folder:
        source = base(Path(folder), seed, 40)
        model = load_full(source)
        layers = _selected(model, text(TARGET, 8, 6000 + seed, LENGTH))
        honest = [train(source, layers, text(TARGET, 4 * STEPS, 2000 + 50 * seed + n), lr=2e-3) for n in range(HONEST)]
        astray = train(source, layers, text(GENERAL[0], 4 * STEPS, 2000 + seed), lr=2e-3)
    held = {TARGET: text(TARGET, sequences, 9000 + seed, LENGTH)}
    held |= {domain: text(domain, sequences // 4, 9000 + seed, LENGTH) for domain in GENERAL}
    return Case(model, layers, [*honest, astray, _noise(model, layers, seed)], held)


def demo_case(sequences: int) -> Case:
    """Return the case of the demo base: one miner that trained four steps on medical text, one that sent noise."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.base.recipes import build_cached
    from connito.data.domains import load_domain
    from connito.data.prepare import Split, part_of
    from connito.moe.resident import compress
    from connito.moe.training import train_local
    from connito.runtime.progress import silent

    source = build_cached("demo", silent) / "model"
    tokenizer, domains = load_tokenizer(source), ("medical", "code", "legal", "speeches", "math")

    def sequences_of(domain: str, part: str, count: int) -> Tokens:
        ids: list[int] = []
        for document in load_domain(domain, 1_000_000):
            if part_of(document.strip(), Split()) == part:
                ids += [*tokenizer(document, verbose=False).input_ids, tokenizer.eos_token_id]
            if len(ids) >= count * (LENGTH + 1):
                break
        return np.asarray(ids[: count * (LENGTH + 1)], dtype=np.int32).reshape(-1, LENGTH + 1)

    model = load_full(source)
    layers = _selected(model, sequences_of("medical", "probe", 8))
    others = {index: [e for e in range(8) if e not in experts] for index, experts in layers.items()}
    batches = sequences_of("medical", "train", 16).reshape(4, 4, LENGTH + 1)
    honest, _ = train_local(compress(load_full(source), layers, others), batches, learning_rate=2e-4)
    held = {d: sequences_of(d, "holdout", sequences if d == "medical" else sequences // 4) for d in domains}
    return Case(model, layers, [honest, _noise(model, layers, 0)], held)


def _selected(model: Any, probe: Tokens) -> dict[int, list[int]]:
    from connito.moe.budget import Budget
    from connito.moe.selection import select_experts
    from connito.moe.statistics import collect

    chosen = select_experts(
        collect(model, probe[:, :-1]), "esft-token", 1.0, budget=Budget(PER_LAYER, scope="layer")
    ).layers
    return {index: sorted(experts) for index, experts in chosen.items()}


def _noise(model: Any, layers: dict[int, list[int]], seed: int) -> Any:
    import torch
    from connito.moe.rows import read_rows

    generator = torch.Generator().manual_seed(seed)
    return {
        name: row + 0.02 * torch.randn(row.shape, generator=generator) for name, row in read_rows(model, layers).items()
    }


def _policy(held: dict[str, Tokens], minimum: int) -> Any:
    from connito.v1.run_pb2 import RunSpec

    target, *others = held
    spec = RunSpec(domain=target)
    spec.holdout.domain = target
    spec.scoring.target_sequences, spec.scoring.general_sequences = len(held[target]), len(held[others[0]])
    spec.scoring.confidence, spec.scoring.retention_margin = 0.95, 0.02
    spec.scoring.minimum_sequences = minimum
    return spec


def _whole(model: Any, layers: dict[int, list[int]], states: list[Any], held: dict[str, Tokens]) -> list[int]:
    """Return the reasons (0: useful) with everything evaluated on a copy of the model each."""
    from connito.moe.rows import write_rows

    def measure(state: Any) -> dict[str, Any]:
        mine = copy.deepcopy(model)
        if state is not None:
            write_rows(mine, layers, state)
        return {domain: _losses(mine, table) for domain, table in held.items()}

    before = measure(None)
    reasons = []
    for state in states:
        after = measure(state)
        reasons.append(
            _score(held, 0, lambda d, i, j: before[d][i:j], lambda d, i, j, after=after: after[d][i:j]).reason
        )
    return reasons


def _raced(
    model: Any, layers: dict[int, list[int]], states: list[Any], held: dict[str, Tokens]
) -> tuple[list[int], int]:
    """Return (reasons, sequences read) as a validator does it, the prefix and the incumbent included in the time."""
    from connito.moe.evaluate import Evaluator

    evaluator, known = Evaluator(model, layers), dict[tuple[str, int, int], Any]()
    read = 0

    def before(domain: str, begin: int, end: int) -> Any:
        key = (domain, begin, end)
        if key not in known:
            known[key] = evaluator.losses(evaluator.base, held[domain][begin:end])[0]
        return known[key]

    def after(state: Any) -> Callable[[str, int, int], Any]:
        def measure(domain: str, begin: int, end: int) -> Any:
            nonlocal read
            read += end - begin
            return evaluator.losses(state, held[domain][begin:end])[0]

        return measure

    reasons = [_score(held, 8, before, after(state)).reason for state in states]
    evaluator.restore()
    return reasons, read


def _score(held: dict[str, Tokens], minimum: int, before: Callable[..., Any], after: Callable[..., Any]) -> Any:
    from connito.protocol.scoring.evaluation import Evaluation, Losses, Measurable, score
    from connito.v1.cycle_pb2 import Submission

    def part(measure: Callable[..., Any]) -> Callable[[Any], Losses]:
        def losses(asked: Any) -> Losses:
            sums = measure(asked.domain, asked.begin, asked.end)
            return Losses(sums, np.full(len(sums), LENGTH, dtype=np.int64))

        return losses

    drawn = {domain: list(range(len(table))) for domain, table in held.items()}
    measurable = Measurable(part(before), part(after), unchanged=False)
    return score(Submission(miner="m"), Evaluation(drawn, measurable, next(iter(held))), _policy(held, minimum))


def _losses(model: Any, table: Tokens, batch: int = 16) -> Any:
    """Return sums of negative log-likelihoods per sequence, from the model's own table of logits."""
    import torch

    sums = []
    with torch.inference_mode():
        for start in range(0, len(table), batch):
            ids = torch.from_numpy(table[start : start + batch].astype(np.int64))
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            sums.append(nll.view(len(ids), -1).double().sum(dim=1).numpy())
    return np.concatenate(sums)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return (processor seconds of this process, result): other things run on the machine."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result
