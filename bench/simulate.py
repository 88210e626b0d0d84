"""Carry out as many simulated storms as asked for, and print the seeds in which something was wrong.

    python -m bench.simulate --seeds 10000 --minutes 14
    python -m bench.simulate --just 1024 --say
    python -m bench.simulate --scenario hours_away --seeds 9 --out out/bench/hours_away.json

Figures add up over calls: what was carried out stays in the document, and a call goes on with the first seed that is not in
it, until all `--seeds` are, or for `--minutes`. `--scenario` is another of
`tests.sim.scenarios` than storms. `--just` carries out one seed alone and writes nothing; with `--say` it shows
what its services log. Exit code 6 when a seed showed a fault.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog
from connito.files import write_durably

from bench.harness import machine
from tests.sim import scenarios
from tests.sim.checks import trace, wrong_with
from tests.sim.world import carry_out, forget


@dataclass
class Done:
    """Adds up all seeds below `next`: faults, kills among them, virtual and CPU seconds, and what was wrong by seed."""

    next: int = 0
    faults: int = 0
    kills: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def carry_out(self, seed: int, scenario: str) -> None:
        """Carry out one seed, and take in what came of it."""
        began, world = time.process_time(), carry_out(seed, getattr(scenarios, scenario)(seed))
        try:
            found = wrong_with(world)
            self.faults += len(world.faults)
            self.kills += world.kills
            self.virtual_s += world.loop.now
            self.cpu_s += time.process_time() - began
            if found:
                self.wrong[str(seed)] = found[:5]
                print(f"seed {seed}: {'; '.join(found[:3])} (trace {trace(world)[:16]})", flush=True)
        finally:
            forget(world)

    def write(self, path: Path) -> None:
        """Write the document anew."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"name": "simulate", "machine": machine(), "figures": asdict(self)}
        write_durably(path, json.dumps(document, indent=1) + "\n")
        print(
            f"{self.next} seeds, {len(self.wrong)} with a fault, {self.faults} faults, {self.cpu_s:.0f} s", flush=True
        )


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--just", type=int, help="carry out this seed alone, and write nothing")
    parser.add_argument("--out", type=Path, default=Path("out/bench/simulate.json"))
    parser.add_argument("--say", action="store_true")
    parser.add_argument("--scenario", default="storm_of")
    asked = parser.parse_args()
    level = "info" if asked.say else "critical"
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    if asked.just is not None:
        alone = Done()
        alone.carry_out(asked.just, asked.scenario)
        return 6 if alone.wrong else 0
    done = Done(**json.loads(asked.out.read_text())["figures"]) if asked.out.exists() else Done()
    until, told = time.monotonic() + 60 * asked.minutes, time.monotonic()
    while done.next < asked.seeds and time.monotonic() < until:
        done.carry_out(done.next, asked.scenario)
        done.next += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            done.write(asked.out)
    done.write(asked.out)
    return 6 if done.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
