"""Works that a thief makes of others' work, from the same bytes to honest steps on top of them; for `bench/work_rates.py`.

Every kind takes θ, victims' states in the order in which they matter, `train(share of the local steps, start)` and a
source of randomness, and gives the states that are handed in: one, or several of one hand. Where there are several the
first is work, and the others are its copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

State: TypeAlias = "dict[str, torch.Tensor]"
Train: TypeAlias = Callable[[float, "State | None"], State]
Make: TypeAlias = Callable[[State, Sequence[State], Train, np.random.Generator], list[State]]


def delta(theta: State, state: State) -> State:
    """Return what a state moved by."""
    return {name: state[name] - rows for name, rows in theta.items()}


def plus(theta: State, *parts: tuple[float, State]) -> State:
    """Return a state after weighted moves."""
    return {name: rows + sum(weight * move[name] for weight, move in parts) for name, rows in theta.items()}


def noise(theta: State, length: float, rng: np.random.Generator) -> State:
    """Return a gaussian move of a length over all tensors."""
    import torch

    drawn = {name: torch.from_numpy(rng.standard_normal(rows.shape, dtype=np.float32)) for name, rows in theta.items()}
    return {name: rows * (length / norm(drawn)) for name, rows in drawn.items()}


def norm(move: State) -> float:
    """Return the length of a move."""
    return math.sqrt(sum(float(rows.double().square().sum()) for rows in move.values()))


def symmetric(state: State, permuted: float, scaled: float, rng: np.random.Generator) -> State:
    """Return the same function in other weights: a share of hidden neurons permuted, and one scaled by two or a half."""
    made = {name: rows.clone() for name, rows in state.items()}
    for name in [name for name in made if name.endswith("gate_up_proj")]:
        for into, out in zip(made[name], made[name.replace("gate_up_proj", "down_proj")], strict=True):
            half = len(into) // 2
            moved = rng.permutation(half)[: int(permuted * half)]
            source = np.roll(moved, 1)
            into[moved], into[half + moved], out[:, moved] = into[source], into[half + source], out[:, source]
            grown = rng.permutation(half)[: int(scaled * half)]
            for part, factor in ((grown[::2], 2.0), (grown[1::2], 0.5)):
                into[half + part] *= factor
                out[:, part] /= factor
    return made


def dropped(move: State, share: float, rng: np.random.Generator) -> State:
    """Return a move of which a share of entries is dropped and the rest scaled up (DARE)."""
    import torch

    kept = {name: torch.from_numpy((rng.random(rows.shape) >= share).astype(np.float32)) for name, rows in move.items()}
    return {name: rows * kept[name] / (1.0 - share) for name, rows in move.items()}


def _low_rank(move: State, rank: int) -> State:
    import torch

    found = {}
    for name, rows in move.items():
        left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
        found[name] = (left[..., :rank] * sizes[:, None, :rank]) @ right[:, :rank]
    return found


def _per_expert(move: State, rng: np.random.Generator) -> State:
    import torch

    factors = {name: rng.uniform(0.3, 2.0, (len(rows), 1, 1)).astype(np.float32) for name, rows in move.items()}
    return {name: rows * torch.from_numpy(factors[name]) for name, rows in move.items()}


def _copy(change: Callable[[State, State, np.random.Generator], Any]) -> Make:
    return lambda theta, victims, train, rng: [change(theta, victims[0], rng)]


def _mixed(count: int, own: float = 0.0, blur: float = 0.0, drop: float = 0.0) -> Make:
    def make(theta: State, victims: Sequence[State], train: Train, rng: np.random.Generator) -> list[State]:
        moves = [delta(theta, victim) for victim in victims[:count]]
        parts = [dropped(move, drop, rng) if drop else move for move in moves]
        made = plus(theta, *[((1.0 - own) / count, part) for part in parts])
        if own:
            made = plus(made, (own, delta(theta, train(1.0, None))))
        return [plus(made, (1.0, noise(theta, blur * norm(moves[0]), rng))) if blur else made]

    return make


def _continued(share: float, count: int = 1, permuted: float = 0.0) -> Make:
    def make(theta: State, victims: Sequence[State], train: Train, rng: np.random.Generator) -> list[State]:
        start = plus(theta, *[(1.0 / count, delta(theta, victim)) for victim in victims[:count]])
        return [symmetric(train(share, start), permuted, 0.0, rng)]

    return make


def _sybils(blur: float, permuted: float, trunk: float = 0.0) -> Make:
    def make(theta: State, victims: Sequence[State], train: Train, rng: np.random.Generator) -> list[State]:
        work = train(trunk or 1.0, None)
        mine = [train(1.0 - trunk, work) for _ in range(3)] if trunk else [work] * 3
        length = blur * norm(delta(theta, work))
        return [symmetric(plus(one, (1.0, noise(theta, length, rng))), permuted, 0.0, rng) for one in mine]

    return make


def _blurred(length: float) -> Make:
    return _copy(lambda theta, victim, rng: plus(victim, (1.0, noise(theta, length * norm(delta(theta, victim)), rng))))


COPIES: Mapping[str, Make] = {
    "copy": _copy(lambda theta, victim, rng: victim),
    "noise 0.1": _blurred(0.1),
    "noise 0.5": _blurred(0.5),
    "noise 1": _blurred(1.0),
    "noise 2": _blurred(2.0),
    "scaled 0.5": _copy(lambda theta, victim, rng: plus(theta, (0.5, delta(theta, victim)))),
    "scaled 1.5": _copy(lambda theta, victim, rng: plus(theta, (1.5, delta(theta, victim)))),
    "scaled by expert": _copy(lambda theta, victim, rng: plus(theta, (1.0, _per_expert(delta(theta, victim), rng)))),
    "neurons scaled": _copy(lambda theta, victim, rng: symmetric(victim, 0.0, 0.6, rng)),
    "neurons permuted": _copy(lambda theta, victim, rng: symmetric(victim, 0.4, 0.0, rng)),
    "DARE 50 %": _copy(lambda theta, victim, rng: plus(theta, (1.0, dropped(delta(theta, victim), 0.5, rng)))),
    "DARE 80 %": _copy(lambda theta, victim, rng: plus(theta, (1.0, dropped(delta(theta, victim), 0.8, rng)))),
    "rank 16": _copy(lambda theta, victim, rng: plus(theta, (1.0, _low_rank(delta(theta, victim), 16)))),
    "rank 4": _copy(lambda theta, victim, rng: plus(theta, (1.0, _low_rank(delta(theta, victim), 4)))),
    "mix of two": _mixed(2),
    "mix of three": _mixed(3),
    "mix of two, noise 1": _mixed(2, blur=1.0),
    "DARE mix of three, 60 %": _mixed(3, drop=0.6),
    "mix of two, neurons permuted": lambda theta, victims, train, rng: [
        symmetric(_mixed(2)(theta, victims, train, rng)[0], 0.4, 0.0, rng)
    ],
    "one work thrice, noise 0.3": _sybils(0.3, 0.0),
    "one work thrice, permuted": _sybils(0.0, 0.4),
}
# Partly own work: steps of the thief's, on text of its own.
PARTLY: Mapping[str, Make] = {
    "copy + 1/8 of the steps": _continued(0.125),
    "copy + 1/4 of the steps": _continued(0.25),
    "copy + 1/2 of the steps": _continued(0.5),
    "copy + 1/4 of the steps, permuted": _continued(0.25, permuted=0.4),
    "average of two + 1/8": _continued(0.125, 2),
    "average of two + 1/4": _continued(0.25, 2),
    "half stolen, half own": _mixed(1, own=0.5),
    "two stolen, half own": _mixed(2, own=0.5),
    "trunk sybils, 3/4 shared": _sybils(0.0, 0.0, trunk=0.75),
}
