"""Carry out as many simulated storms as asked for, and print the seeds in which something was wrong.

    python -m bench.simulate --seeds 10000 --from 0 --done .simulated

`--done` keeps what was carried out already: a second call goes on behind it. `--say` shows what the services of one seed
log. Exit code 6 when a seed shows a fault.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import structlog

from tests.sim.checks import trace, wrong_with
from tests.sim.scenarios import storm_of
from tests.sim.world import carry_out, forget


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--done", type=Path, default=None)
    parser.add_argument("--say", action="store_true")
    asked = parser.parse_args()
    level = "info" if asked.say else "critical"
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    done = json.loads(asked.done.read_text()) if asked.done is not None and asked.done.exists() else {}
    began = told = time.monotonic()
    for seed in range(asked.first, asked.first + asked.seeds):
        if str(seed) not in done:
            done[str(seed)] = _one(seed)
        if time.monotonic() - told > 5 or seed == asked.first + asked.seeds - 1:
            told = time.monotonic()
            bad = sum(1 for found in done.values() if found)
            print(f"{len(done)} seeds, {bad} with a fault, {told - began:.0f} s", flush=True)
            if asked.done is not None:
                asked.done.write_text(json.dumps(done))
    return 6 if any(done.values()) else 0


def _one(seed: int) -> list[str]:
    world = carry_out(seed, storm_of(seed))
    try:
        wrong = wrong_with(world)
        if wrong:
            print(f"seed {seed}: {'; '.join(wrong[:3])} (trace {trace(world)[:16]})", flush=True)
        return wrong
    finally:
        forget(world)


if __name__ == "__main__":
    raise SystemExit(main())
