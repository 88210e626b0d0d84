"""Run a published figure again and compare: `python -m bench.reproduce NAME`.

Reads the document under `docs/evidence`, runs the benchmark with the same seeds, and compares what it prints number by number.
What is a time, or follows from one, is another on another machine: `--within` says how far apart numbers may be,
relative to the published one. Ends with 0 for the same, 6 where something differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.evidence import COPIES
from bench.harness import Options, machine, note

DIFFERS, MISSING = 6, 4
# Of the arithmetic: sums of floats differ in their last digits between machines.
ROUNDING = 1e-6


def main() -> int:
    """Read the command line, run, compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__)
    parser.add_argument("name", help="a document of docs/evidence, without .json")
    parser.add_argument("--within", type=float, default=ROUNDING, help="relative distance (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to run; parts that are there are taken (default: a new folder)")
    arguments = parser.parse_args()
    path = COPIES / f"{arguments.name}.json"
    if not path.exists():
        there = ", ".join(sorted(each.stem for each in COPIES.glob("*.json")))
        print(f"no figure is called {arguments.name}; there are {there}", file=sys.stderr)
        return MISSING
    published = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        again = _run(arguments.name, published, arguments.out or Path(folder))
    return report(published, again, arguments.within)


def _run(name: str, published: dict[str, Any], out: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    settings = published["settings"]
    options = Options(settings["quick"], settings["seeds"], out, settings.get("only", ""))
    result = importlib.import_module(f"bench.{name}").run(options)
    # As it is written: keys of JSON are texts, and tuples are lists.
    return dict(json.loads(json.dumps({"figures": result.figures, "machine": machine()})))


def report(published: dict[str, Any], again: dict[str, Any], within: float) -> int:
    """Print what differs; returns the exit status."""
    for what in ("cpu", "cores", "python", "versions"):
        if published["machine"].get(what) != again["machine"].get(what):
            note(f"{what}: published with {published['machine'].get(what)}, here {again['machine'].get(what)}")
    found = list(differences(published["figures"], again["figures"], within))
    for line in found:
        print(line)
    print(f"{published['name']}: {f'{len(found)} numbers differ' if found else 'same'}")
    return DIFFERS if found else 0


def differences(there: Any, here: Any, within: float, where: str = "") -> Iterator[str]:
    """Yield where two documents differ by more than `within` of the published number, or at all in anything else."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from differences(there.get(key), here.get(key), within, f"{where}.{key}" if where else str(key))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for place, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from differences(one, other, within, f"{where}[{place}]")
    elif not _same(there, here, within):
        yield f"{where}: published {there}, here {here}"


def _same(there: Any, here: Any, within: float) -> bool:
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (there, here))
    return math.isclose(there, here, rel_tol=within, abs_tol=1e-12) if numbers else bool(there == here)


if __name__ == "__main__":
    sys.exit(main())
