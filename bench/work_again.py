"""Rates over cycles: works of earlier cycles that are handed in again, and honest work beside them.

Six honest miners really train three cycles on a tiny base, each from the mean of the one before. In the second and third a thief
hands in work of an earlier one, in each of the forms below, and so does the miner whose it was. All are judged by the rule of
runs (`handed_in_again`) against all works of the cycles before.

`framed`: somebody who knew which text a miner is given next, which the head before a cycle draws, trained from it a
cycle earlier, and handed that in, so that the honest miner's work of now be called a copy. `framed now`: somebody trains
from it in the same cycle, in another order, and commits first; judged by `own_work`.

fresh text   everybody has other text of its domain in each cycle; miners of two domains
own text     everybody reads its own text again in each cycle
few answers  everybody reads the same six sequences in each cycle, in another order
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.protocol.scoring.copies import CopyEvidence
from connito.protocol.scoring.functions import function_gram
from connito.protocol.scoring.own_work import handed_in_again, own_work
from connito.v1 import artifacts_pb2, cycle_pb2

from bench.compose_setup import text
from bench.harness import Options, Result, main, note
from bench.tiny_rig import LENGTH, Rig, Tokens, batched, rig_settings, rigs
from bench.work_kinds import delta, noise, norm, plus, symmetric
from bench.work_rates import MEASURED_ON, NUMBERS, Ground

if TYPE_CHECKING:
    from bench.work_kinds import State

WORLDS = ("fresh text", "own text", "few answers")
MINERS, CYCLES, STEPS, OUTER, QUICK_SEEDS = 6, 3, 8, 0.7, 1
# (θ now, earlier works' moves, the one of the miner first, randomness) -> what is handed in
Again = Callable[["State", Sequence["State"], np.random.Generator], "State"]


def _blurred(length: float) -> Again:
    return lambda theta, moves, rng: plus(theta, (1.0, moves[0]), (1.0, noise(theta, length * norm(moves[0]), rng)))


AGAIN: Mapping[str, Again] = {
    "as it was": lambda theta, moves, rng: plus(theta, (1.0, moves[0])),
    "scaled 0.5": lambda theta, moves, rng: plus(theta, (0.5, moves[0])),
    "neurons permuted": lambda theta, moves, rng: symmetric(plus(theta, (1.0, moves[0])), 0.4, 0.0, rng),
    "noise 0.1": _blurred(0.1),
    "noise 0.3": _blurred(0.3),
    "noise 1": _blurred(1.0),
    "mix of two": lambda theta, moves, rng: plus(theta, (0.5, moves[0]), (0.5, moves[1])),
    "mean of all": lambda theta, moves, rng: plus(theta, *((1.0 / len(moves), move) for move in moves)),
}


@dataclass
class _Cycle:
    """A cycle's start, honest works and their moves; works made from the text that its miners get next, and twins of now."""

    theta: Path
    works: list[Path]
    moves: list[State]
    ahead: list[Path]
    twins: list[Path]


def run(options: Options) -> Result:
    """Train, hand in again and judge, in every world."""
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS) as each:
        for rig in each:
            for world in WORLDS:
                note(f"seed {rig.seed}, {world}")
                with tempfile.TemporaryDirectory() as folder:
                    rows += _world(rig, world, Path(folder))
    settings = {"miners": MINERS, "cycles": CYCLES, "local_steps": STEPS, "domains": list(MEASURED_ON)}
    return Result({**settings, **rig_settings(options, QUICK_SEEDS)}, rows, _figures(rows))


def _world(rig: Rig, world: str, folder: Path) -> list[dict[str, Any]]:
    from connito.moe.state import load_state, save_state

    ground, rng = Ground(rig, "non-IID", folder, target_domains=MEASURED_ON), np.random.default_rng(rig.seed)
    told: list[_Cycle] = []
    theta, rows = ground.start().state, []
    for cycle in range(1, CYCLES + 1):
        before = load_state(theta)
        works = [ground.train(theta, _text(ground, world, miner, cycle, rng)) for miner in range(MINERS)]
        paths = [folder / f"{cycle}-{miner}.safetensors" for miner in range(MINERS)]
        for path, state in zip(paths, works, strict=True):
            save_state(state, path)
        ahead, twins = (
            [folder / f"ahead-{cycle}-{n}" for n in range(MINERS)],
            [folder / f"twin-{cycle}-{n}" for n in range(MINERS)],
        )
        for miner in range(MINERS):
            save_state(ground.train(theta, _text(ground, world, miner, cycle + 1, rng)), ahead[miner])
            own = _text(ground, world, miner, cycle, rng)
            flat = rng.permutation(own.reshape(-1, own.shape[-1]))
            save_state(ground.train(theta, flat.reshape(own.shape)), twins[miner])
        now = _Cycle(theta, paths, [delta(before, state) for state in works], ahead, twins)
        if told:
            rows += _judged(rig.seed, world, cycle, told, theta, paths, folder, rng)
            rows += [*_framed(rig.seed, world, cycle, told, now), *_framed_now(rig.seed, world, cycle, now)]
        told.append(now)
        theta = folder / f"theta-{cycle}.safetensors"
        save_state(plus(before, *((OUTER / MINERS, move) for move in now.moves)), theta)
    return rows


def _text(ground: Ground, world: str, miner: int, cycle: int, rng: np.random.Generator) -> Tokens:
    if world != "few answers":
        return ground.shard(miner, cycle if world == "fresh text" else 1, STEPS)
    size = ground.spec.training.batch_sequences
    few = text(MEASURED_ON[0], 6, 33_000 + ground.rig.seed, LENGTH)
    order = np.concatenate([rng.permutation(6) for _ in range(STEPS * size // 6 + 1)])
    return batched(few[order[: STEPS * size]], size)


def _judged(
    seed: int, world: str, cycle: int, told: Sequence[_Cycle], base: Path, works: Sequence[Path], folder: Path,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    from connito.moe.state import load_state, save_state

    theta, last = load_state(base), told[-1]
    handed: list[tuple[str, str, Path]] = [("honest", f"M{miner}", path) for miner, path in enumerate(works)]
    for number, (name, make) in enumerate(AGAIN.items()):
        for victim in range(MINERS):
            path = folder / f"again-{cycle}-{number}-{victim}.safetensors"
            order = [victim, *(other for other in range(MINERS) if other != victim)]
            save_state(make(theta, [last.moves[place] for place in order], rng), path)
            handed += [(f"another's, {name}", "thief", path), (f"its own, {name}", f"M{victim}", path)]
    earlier = [(f"M{miner}", path, one.theta) for one in reversed(told) for miner, path in enumerate(one.works)]
    # Whoever hands it in, a file is one.
    place_of = {path: len(earlier) + place for place, path in enumerate(dict.fromkeys(path for _, _, path in handed))}
    files = [*(path for _, path, _ in earlier), *place_of]
    bases = [*(start for _, _, start in earlier), *(base for _ in place_of)]
    grams = gram_matrix(DeltaFiles(files, bases)), function_gram(files, bases, bytes([cycle]) * 32)
    before = [cycle_pb2.Submission(miner=miner, commit_sequence=1 + n) for n, (miner, _, _) in enumerate(earlier)]
    rows = []
    for kind, miner, path in handed:
        entry = cycle_pb2.Submission(miner=miner, commit_sequence=1000)
        keep = np.array([*range(len(earlier)), place_of[path]])
        own = tuple(gram[np.ix_(keep, keep)] for gram in grams)
        found = handed_in_again([entry], [entry], before, (own[0], own[1]), _policy(), NUMBERS)
        rows.append(_row(seed, world, cycle, kind, path, bool(found)))
    return rows


def _framed(seed: int, world: str, cycle: int, told: Sequence[_Cycle], now: _Cycle) -> list[dict[str, Any]]:
    last, rows = told[-1], []
    for miner, work in enumerate(now.works):
        files = [*last.works, last.ahead[miner], work]
        bases = [*[last.theta] * (MINERS + 1), now.theta]
        grams = gram_matrix(DeltaFiles(files, bases)), function_gram(files, bases, bytes([cycle]) * 32)
        names = [*(f"M{n}" for n in range(MINERS)), "framer"]
        before = [cycle_pb2.Submission(miner=name, commit_sequence=1 + n) for n, name in enumerate(names)]
        entry = cycle_pb2.Submission(miner=f"M{miner}", commit_sequence=1000)
        found = handed_in_again([entry], [entry], before, grams, _policy(), NUMBERS)
        rows.append(_row(seed, world, cycle, "framed a cycle ahead", work, bool(found)))
    return rows


def _framed_now(seed: int, world: str, cycle: int, now: _Cycle) -> list[dict[str, Any]]:
    rows = []
    for miner, work in enumerate(now.works):
        others = [path for place, path in enumerate(now.works) if place != miner]
        files = [now.twins[miner], *others, work]
        bases = [now.theta] * len(files)
        grams = gram_matrix(DeltaFiles(files, bases)), function_gram(files, bases, bytes([cycle]) * 32)
        entries = [
            cycle_pb2.Submission(
                miner=f"F{place}", commit_sequence=1 + place, artifact=artifacts_pb2.ArtifactRef(digest=f"{place:064x}")
            )
            for place in range(len(files))
        ]
        found = own_work(entries, CopyEvidence(grams[0]), grams[1], _policy(), NUMBERS)
        rows.append(_row(seed, world, cycle, "framed in the same cycle", work, entries[-1].miner in found.original))
    return rows


def _row(seed: int, world: str, cycle: int, kind: str, work: Path, found: bool) -> dict[str, Any]:
    return {"seed": seed, "world": world, "cycle": cycle, "kind": kind, "work": work.stem, "found": found}


def _policy() -> Any:
    from connito.local.defaults import UpOptions, profile

    return profile(UpOptions(base="tiny").checked()).spec.scoring


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        figures[kind] = {
            world: [sum(row["found"] for row in group), len(group)]
            for world in WORLDS
            if (group := [row for row in rows if (row["kind"], row["world"]) == (kind, world)])
        }
    return figures


if __name__ == "__main__":
    main("work_again", run, doc=__doc__, seeds=5)
