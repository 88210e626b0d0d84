"""Protocol overhead: seconds from the opening of the train window to the new model version, with next to no training.

Tiny base, four miners, three validators, one local step, scoring on. The first cycle is left out: models are being
loaded then. What remains is events, signatures, uploads, and small forward passes.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench.harness import Options, Result, main
from bench.platform import run_up

WINDOWS = ("train", "commit", "submit", "validate", "merge")


def run(options: Options) -> Result:
    """Make `seeds` runs of several cycles; report the median cycle and the median of each window."""
    cycles = 5 if options.quick else 12
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory(prefix="connito-bench-") as folder:
            report = run_up(
                Path(folder) / "data",
                *("--base", "tiny", "--cycles", str(cycles), "--miners", "4", "--validators", "3"),
                *("--set", "training.local_steps=1", "--seed", str(seed)),
            )
        rows += [
            {"seed": seed, "cycle": cycle["cycle"], "gate": cycle["gate"], **cycle["seconds"]}
            for cycle in report["cycles"][1:]
        ]
    totals = [sum(row[window] for window in WINDOWS) for row in rows]
    figures = {
        "cycle_seconds_median": round(statistics.median(totals), 3),
        "cycle_seconds_max": round(max(totals), 3),
        **{f"{window}_seconds_median": round(statistics.median(row[window] for row in rows), 3) for window in WINDOWS},
    }
    return Result({"cycles": cycles, "miners": 4, "validators": 3, "local_steps": 1}, rows, figures)


if __name__ == "__main__":
    main("overhead", run, doc=__doc__)
