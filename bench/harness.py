"""Shared parts of benchmarks: command line, description of the machine, and form of the output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """Options of a benchmark. `quick` must end within a minute; its figures say that they are quick."""

    quick: bool
    seeds: int
    out: Path
    # Words of which the name of a part that is to be run holds one, where a benchmark keeps its parts.
    only: str = ""


@dataclass
class Result:
    """`rows` are the measurements, `figures` what the docs quote from them."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def machine() -> dict[str, Any]:
    """Return processor, cores, memory in bytes, versions, and whether a GPU took part."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": gpu_name(),
        "versions": {name: _version(name) for name in ("connito", "numpy", "torch", "transformers")},
    }


def gpu_name() -> str | None:
    """Return the name of the GPU that this process uses, if it uses one."""
    torch = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_initialized()
    return torch.cuda.get_device_name() if torch is not None and used else None


def _version(name: str) -> str | None:
    """Return a package's version; none where its folder is on the path without being installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return mean and two-sided t interval over seeds. With one value the interval is that value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def by_seed(
    options: Options, name: str, measure: Callable[[int], list[dict[str, Any]]], seeds: int
) -> list[dict[str, Any]]:
    """Return the rows of all seeds. Each seed's are kept in a file, so that a run goes on where it was stopped."""
    folder = options.out / (f"{name}-quick" if options.quick else f"{name}-seeds")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        path = folder / f"{seed}.json"
        if not path.exists():
            note(f"{name}: seed {seed}")
            path.write_text(json.dumps(measure(seed)))
        rows += json.loads(path.read_text())
    return rows


def note(text: str) -> None:
    """Print progress on stderr, so that `--json` stays clean."""
    print(text, file=sys.stderr, flush=True)


def main(name: str, run: Callable[[Options], Result], *, doc: str, seeds: int = 1) -> None:
    """Parse the command line, run, write `<out>/<name>.json`, and print the figures or, with --json, the document."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc)
    parser.add_argument("--quick", action="store_true", help="within a minute; smaller and less certain")
    parser.add_argument("--seeds", type=int, default=seeds, help="repetitions of what is random (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the whole document")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder for JSON and plots (default %(default)s)"
    )
    parser.add_argument(
        "--only", default="", help="run the parts whose names hold one of these words, where parts are kept"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    result = run(Options(arguments.quick, arguments.seeds, arguments.out, arguments.only))
    document = {
        "name": name,
        "machine": machine(),
        "settings": {"quick": arguments.quick, "seeds": arguments.seeds, **result.settings},
        "rows": result.rows,
        "figures": result.figures,
        "seconds": round(time.monotonic() - started, 1),
    }
    (arguments.out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    print(
        f"{name}{' (quick)' if arguments.quick else ''}: {document['seconds']} s, written to {arguments.out / f'{name}.json'}"
    )
    for key, value in result.figures.items():
        print(f"  {key}: {value}")
