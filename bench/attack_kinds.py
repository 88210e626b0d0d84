"""The attacks on quality: what each attacker hands in, and which answer counts as found out.

An attacker knows what it could know: the state and its history, the spec, its own text, and where the attack is theft,
what a victim made. Files are attacked here too; messages in `bench/attack_messages.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.v1 import cycle_pb2, reasons_pb2

from bench.attack_arena import GENERAL, HONEST, Arena, Lie, Standing
from bench.compose_setup import text
from bench.tiny_rig import LENGTH, Tokens, batched

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Knowledge:
    """The knowledge of an attacker. `victims` are the honest results of the cycle, in the order of commitment."""

    arena: Arena
    cycle: int
    standing: Standing
    theta: State
    victims: Sequence[State]
    rng: np.random.Generator


# What is handed in: one state, or the bytes of a file, per identity.
Forge = Callable[[Knowledge], Sequence["State | bytes"]]


@dataclass(frozen=True)
class Attack:
    """One row of the table. `found`: reasons that mean it was recognised. `first` commits before everybody else."""

    name: str
    forge: Forge
    found: tuple[str, ...] = ()
    validators: int = 3
    lies: Callable[[int], Mapping[int, Lie]] = field(default=lambda _: {})
    first: bool = False
    note: str = ""


def _map(know: Knowledge, change: Callable[[str, Any], Any]) -> State:
    return {name: change(name, rows) for name, rows in know.theta.items()}


def _delta(know: Knowledge, victim: int) -> State:
    return {name: know.victims[victim][name] - rows for name, rows in know.theta.items()}


def _length(delta: State) -> float:
    return math.sqrt(sum(float(rows.double().square().sum()) for rows in delta.values()))


def _noise(know: Knowledge, length: float) -> State:
    """Return gaussian noise of a given length over all tensors together."""
    import torch

    drawn = _map(know, lambda _, rows: torch.from_numpy(know.rng.standard_normal(rows.shape, dtype=np.float32)))
    scale = length / _length(drawn)
    return {name: rows * scale for name, rows in drawn.items()}


def mixed(know: Knowledge, parts: Mapping[int, float], noise: float = 0.0, own: float = 0.0) -> State:
    """Return θ_t plus a combination of what victims did, plus noise in units of the first one's length, plus own work."""
    deltas = {victim: _delta(know, victim) for victim in parts}
    blur = _noise(know, noise * _length(deltas[next(iter(parts))])) if noise else None
    mine = know.arena.train(know.standing.state, know.arena.shard(HONEST, know.cycle)) if own else None

    def mix(name: str, rows: Any) -> Any:
        moved = sum(part * deltas[victim][name] for victim, part in parts.items())
        moved = moved if blur is None else moved + blur[name]
        return rows + (moved if mine is None else moved + own * (mine[name] - rows))

    return _map(know, mix)


def _own(know: Knowledge, steps: int = 0, who: int = HONEST) -> State:
    return know.arena.train(know.standing.state, know.arena.shard(who, know.cycle, steps))


def _scaled_own(know: Knowledge, factor: float) -> State:
    mine = _own(know)
    return _map(know, lambda name, rows: rows + factor * (mine[name] - rows))


def _extrapolated(know: Knowledge) -> State:
    """Return the last published step once more, without training."""
    from connito.moe.state import load_state

    if know.standing.previous is None:
        return dict(know.theta)
    before = load_state(know.standing.previous)
    return _map(know, lambda name, rows: rows + (rows - before[name]))


def _backdoor(know: Knowledge) -> State:
    """Return lower the target's loss and raise that of general text, in every step: useful work that breaks other
    domains.
    """
    own = know.arena.shard(HONEST, know.cycle, 16)
    general = np.concatenate([text(domain, 32, 70_000 + know.cycle, LENGTH) for domain in GENERAL])
    return know.arena.sabotage(know.standing.state, own, batched(know.rng.permutation(general), own.shape[1]))


def _overfitted(know: Knowledge, table: Tokens) -> State:
    """Train three times the honest steps on a few sequences."""
    rows = np.concatenate([table] * 8)[: 24 * 4]
    return know.arena.train(know.standing.state, batched(know.rng.permutation(rows), 4))


def _split_sybils(know: Knowledge) -> list[State]:
    """Return one share of work, handed in three times with noise of 30 % of its length."""
    mine = _own(know)
    delta = {name: mine[name] - rows for name, rows in know.theta.items()}
    blurs = [_noise(know, 0.3 * _length(delta)) for _ in range(3)]
    return [{name: rows + blur[name] for name, rows in mine.items()} for blur in blurs]


def _shared_out(know: Knowledge) -> list[State]:
    """Return one share of work, cut in two between two keys: neither holds a row of the other's."""
    mine, names = _own(know), sorted(know.theta)
    return [{**know.theta, **{name: mine[name] for name in names[part::2]}} for part in range(2)]


def _friend(report: cycle_pb2.ScoreReport) -> None:
    _claim(report, "attacker-1", 5.0, reasons_pb2.REASON_UNSPECIFIED)


def _rival(report: cycle_pb2.ScoreReport) -> None:
    best = max(report.scores, key=lambda entry: entry.utility)
    _claim(report, best.miner, 0.0, reasons_pb2.REASON_NO_IMPROVEMENT)


def _frame(report: cycle_pb2.ScoreReport) -> None:
    """Report for every later miner the effect of the first one."""
    first, *others = report.scores
    for entry in others:
        del entry.losses[:]
        entry.losses.extend(first.losses)


def _claim(report: cycle_pb2.ScoreReport, miner: str, utility: float, reason: Any) -> None:
    for entry in report.scores:
        if entry.miner == miner:
            entry.utility, entry.reason = utility, reason


def _last(count: int, lie: Lie) -> Callable[[int], Mapping[int, Lie]]:
    return lambda validators: dict.fromkeys(range(validators - count, validators), lie)


def _file(damage: Callable[[Knowledge, bytes], bytes]) -> Forge:
    """Own work, written to a file that is not what it should be."""

    def forge(know: Knowledge) -> list[State | bytes]:
        from connito.moe.state import save_state

        path = know.arena.folder / "damaged.safetensors"
        save_state(_own(know), path)
        return [damage(know, path.read_bytes())]

    return forge


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(text_: bytes, body: bytes) -> bytes:
    return len(text_).to_bytes(8, "little") + text_ + body


def _bomb(know: Knowledge, data: bytes) -> bytes:
    """Return a header that says it is as long as memory is."""
    return (1 << 40).to_bytes(8, "little") + data[8:]


def _nested(know: Knowledge, data: bytes) -> bytes:
    return _with_header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", _header(data)[1])


def _overlapping(know: Knowledge, data: bytes) -> bytes:
    header, body = _header(data)
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    return _with_header(json.dumps(header).encode(), body)


def _duplicate(know: Knowledge, data: bytes) -> bytes:
    header, body = _header(data)
    name = next(name for name in header if name != "__metadata__")
    again = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    return _with_header(again.encode(), body)


def _misshaped(know: Knowledge, data: bytes) -> bytes:
    header, body = _header(data)
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    entry["shape"] = [entry["shape"][0] * entry["shape"][1], *entry["shape"][2:]]
    return _with_header(json.dumps(header).encode(), body)


def _not_finite(know: Knowledge) -> list[State | bytes]:
    mine = _own(know)
    name = next(iter(mine))
    mine[name] = mine[name].clone()
    mine[name].view(-1)[0] = float("nan")
    return [mine]


_COPY = ("copy",)
_USELESS = ("no-improvement", "not-significant", "unchanged")

ATTACKS: tuple[Attack, ...] = (
    Attack("copier", lambda k: [mixed(k, {0: 1.0})], _COPY),
    Attack("griefing copier", lambda k: [mixed(k, {v: 1.0}) for v in range(3)], _COPY, note="copies three to void them"),
    Attack("noisy copier, 0.1", lambda k: [mixed(k, {0: 1.0}, 0.1)], _COPY, note="noise over length"),
    Attack("noisy copier, 0.5", lambda k: [mixed(k, {0: 1.0}, 0.5)], _COPY),
    Attack("noisy copier, 1", lambda k: [mixed(k, {0: 1.0}, 1.0)], _COPY),
    Attack("noisy copier, 2", lambda k: [mixed(k, {0: 1.0}, 2.0)], _COPY),
    Attack("scaled copier, 1.5", lambda k: [mixed(k, {0: 1.5})], _COPY),
    Attack("scaled copier, 0.5", lambda k: [mixed(k, {0: 0.5})], _COPY),
    Attack("mixed copier, two", lambda k: [mixed(k, {0: 0.5, 1: 0.5})], _COPY),
    Attack("mixed copier, all", lambda k: [mixed(k, dict.fromkeys(range(HONEST), 1 / HONEST))], _COPY),
    Attack("mixed copier, two, noise 1", lambda k: [mixed(k, {0: 0.5, 1: 0.5}, 1.0)], _COPY),
    Attack("half stolen, half own", lambda k: [mixed(k, {0: 0.5}, own=0.5)], _COPY),
    Attack("free-rider", lambda k: [dict(k.theta)], ("unchanged",)),
    Attack("free-rider, last step again", lambda k: [_extrapolated(k)], (*_USELESS, "copy"), note="from cycle 2"),
    Attack("random noise", lambda k: [_map(k, lambda n, r: r + _noise_like(k)[n])], _USELESS),
    Attack("sign flip", lambda k: [mixed(k, {0: -1.0})], (*_USELESS, "retention-broken", "copy")),
    Attack("large norm, × 200", lambda k: [_scaled_own(k, 200.0)], ("norm-exceeded",)),
    Attack("large norm, × 5", lambda k: [_scaled_own(k, 5.0)], (*_USELESS, "retention-broken", "norm-exceeded")),
    Attack("backdoor", lambda k: [_backdoor(k)], ("retention-broken", *_USELESS)),
    Attack("overfitter, guesses", lambda k: [_overfitted(k, _guesses(k))], _USELESS, note="own text, 3 × the steps"),
    Attack("overfitter, last draw leaked", lambda k: [_overfitted(k, k.arena.drawn(k.cycle - 1))], _USELESS),
    Attack("overfitter, this draw known", lambda k: [_overfitted(k, k.arena.drawn(k.cycle))], note="without the beacon"),
    Attack("sybils, one work thrice", _split_sybils, _COPY, note="the first is paid for its work"),
    Attack("sybils, one work cut in two", _shared_out, note="each half is nobody else's"),
    Attack("1 of 3 validators inflates", lambda k: [_nudged(k)], _USELESS, lies=_last(1, _friend)),
    Attack("1 of 3 validators sinks", lambda k: [], lies=_last(1, _rival)),
    Attack("1 of 3 validators frames", lambda k: [], lies=_last(1, _frame)),
    Attack("2 of 5 validators inflate", lambda k: [_nudged(k)], _USELESS, validators=5, lies=_last(2, _friend)),
    Attack("2 of 5 validators sink", lambda k: [], validators=5, lies=_last(2, _rival)),
    Attack("2 of 3 validators inflate", lambda k: [_nudged(k)], lies=_last(2, _friend), note="beyond the promise"),
    Attack("not a number", _not_finite, ("non-finite",)),
    Attack("oversized file", _file(lambda k, data: data + bytes(2 * len(data))), ("bad-header", "oversized")),
    Attack("truncated file", _file(lambda k, data: data[: len(data) // 2]), ("bad-header",)),
    Attack("mis-shaped tensors", _file(_misshaped), ("wrong-shape",)),
    Attack("header bomb, length", _file(_bomb), ("bad-header",)),
    Attack("header bomb, nesting", _file(_nested), ("bad-header",)),
    Attack("overlapping offsets", _file(_overlapping), ("bad-header",)),
    Attack("duplicate keys", _file(_duplicate), ("bad-header",)),
)  # fmt: skip


def _noise_like(know: Knowledge) -> State:
    return _noise(know, _length(_delta(know, 0)))


def _nudged(know: Knowledge) -> State:
    """Return a friend's worthless file: the state with a little noise."""
    blur = _noise(know, 0.1 * _length(_delta(know, 0)))
    return _map(know, lambda name, rows: rows + blur[name])


def _guesses(know: Knowledge) -> Tokens:
    domains = know.arena.domains
    rows = [text(domain, 16 // len(domains), 80_000 + know.cycle, LENGTH) for domain in domains]
    return np.concatenate(rows)


def upload(know: Knowledge, made: State | bytes, path: Path) -> Path:
    """Write what an attacker made."""
    from connito.moe.state import save_state

    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        save_state(made, path)
    return path
