"""Run a published figure again and compare: `python -m bench.reproduce NAME`.

Reads the document under `docs/evidence`, runs what was published of the benchmark with the same seeds, and compares what it
prints number by number: to rounding, or to `--within`, relative to the published one. What is a time, or follows from
one, is another on another machine: it is the same up to a factor, `--times`. Ends with 0 for the same, 6 where something differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evidence import COPIES
from bench.harness import Options, machine, note

DIFFERS, MISSING = 6, 4
# Of the arithmetic: sums of floats differ in their last digits between machines.
ROUNDING = 1e-6
# Of each benchmark, what is in the names of numbers that follow from a clock; an empty word is in all.
TIMED = {
    "cost": ("step_cpu", "memory"),
    "engine": ("speed, ", "first", "later"),
    "residency": ("_ms",),
    "search": ("seconds", "_ms"),
    "starting": ("",),
    "validator_throughput": ("forward", "prefix", "faster", "per_minute"),
}


@dataclass(frozen=True)
class Near:
    """A distance that numbers may have: `within` of the published one, or by a factor of `times` where `timed` is in the name."""

    within: float = ROUNDING
    times: float = 1.0
    timed: tuple[str, ...] = ()

    def same(self, there: float, here: float, where: str) -> bool:
        """Return whether the number of this name is the published one."""
        if self.from_clock(where) and there * here > 0 and 1 / self.times <= there / here <= self.times:
            return True
        return math.isclose(there, here, rel_tol=self.within, abs_tol=1e-12)

    def from_clock(self, where: str) -> bool:
        """Return whether a number follows from a clock."""
        return any(word in where for word in self.timed)


def main() -> int:
    """Read the command line, run, compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__)
    parser.add_argument("name", help="a document of docs/evidence, without .json")
    parser.add_argument("--within", type=float, default=ROUNDING, help="relative distance (default %(default)s)")
    parser.add_argument("--times", type=float, default=3.0, help="factor between times (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to run; parts that are there are taken (default: a new folder)")
    arguments = parser.parse_args()
    path = COPIES / f"{arguments.name}.json"
    if not path.exists():
        there = ", ".join(sorted(each.stem for each in COPIES.glob("*.json")))
        print(f"no figure is called {arguments.name}; there are {there}", file=sys.stderr)
        return MISSING
    published = json.loads(path.read_text())
    if not hasattr(importlib.import_module(f"bench.{arguments.name}"), "run"):
        print(
            f"{arguments.name} is run over pools or clusters of its own: see `python -m bench.{arguments.name} --help`",
            file=sys.stderr,
        )
        return MISSING
    with tempfile.TemporaryDirectory() as folder:
        again = _run(arguments.name, published, arguments.out or Path(folder))
    near = Near(arguments.within, arguments.times, TIMED.get(arguments.name, ()))
    return report(published, again, near)


def _run(name: str, published: dict[str, Any], out: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    settings = published["settings"]
    options = Options(settings["quick"], settings["seeds"], out, settings.get("only", ""))
    result = importlib.import_module(f"bench.{name}").run(options)
    # As it is written: keys of JSON are texts, and tuples are lists.
    return dict(json.loads(json.dumps({"figures": result.figures, "machine": machine()})))


def report(published: dict[str, Any], again: dict[str, Any], near: Near) -> int:
    """Print what differs; returns the exit status."""
    for what in ("cpu", "cores", "python", "versions"):
        if published["machine"].get(what) != again["machine"].get(what):
            note(f"{what}: published with {published['machine'].get(what)}, here {again['machine'].get(what)}")
    found = list(differences(published["figures"], again["figures"], near))
    for line in found:
        print(line)
    print(f"{published['name']}: {f'{len(found)} numbers differ' if found else 'same'}")
    return DIFFERS if found else 0


def differences(there: Any, here: Any, near: Near, where: str = "") -> Iterator[str]:
    """Yield where two documents have numbers that are further apart than they may be, or anything else that is another."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from differences(there.get(key), here.get(key), near, f"{where}.{key}" if where else str(key))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for place, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from differences(one, other, near, f"{where}[{place}]")
    elif not _same(there, here, near, where):
        yield f"{where}: published {there}, here {here}"


def _same(there: Any, here: Any, near: Near, where: str) -> bool:
    if isinstance(there, str) and isinstance(here, str) and near.from_clock(where):
        return True  # A sentence of times.
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (there, here))
    return near.same(there, here, where) if numbers else bool(there == here)


if __name__ == "__main__":
    sys.exit(main())
