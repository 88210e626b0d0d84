"""The demo: a real base, three miners, three validators; loss gained, time, memory and bytes.

Losses are measured on the report subset of the hold-out, which neither scores submissions nor decides the gate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.harness import Options, Result, main
from bench.platform import run_up


def run(options: Options) -> Result:
    """Run the demo once; with --quick on the tiny base."""
    base = "tiny" if options.quick else "demo"
    cycles = 2 if options.quick else 3
    with tempfile.TemporaryDirectory(prefix="connito-bench-") as folder:
        data_dir = Path(folder) / "data"
        domain = [] if options.quick else ["--domain", "medical"]
        report = run_up(
            data_dir, "--base", base, "--cycles", str(cycles), "--miners", "3", "--validators", "3", *domain
        )
    first, last = report["cycles"][0], report["cycles"][-1]
    kept = ("target_loss_before", "target_loss_after", "domains", "gate", "upload_bytes_per_miner", "seconds")
    rows = [
        {"cycle": cycle["cycle"], "merged": len(cycle["merged"]), **{key: cycle[key] for key in kept}}
        for cycle in report["cycles"]
    ]
    changes = {name: last["domains"][name]["after"] - first["domains"][name]["before"] for name in first["domains"]}
    target = changes.pop(report["domain"])
    totals = report["totals"]
    figures = {
        "target_loss_change": round(target, 4),
        "general_loss_changes": {name: round(change, 4) for name, change in changes.items()},
        "worst_general_change": round(max(changes.values()), 4),
        "peak_memory_gib": round(totals["peak_memory_bytes"] / 2**30, 2),
        "upload_bytes_per_miner_and_cycle": totals["upload_bytes_per_miner_and_cycle"],
        "upload_bits_a_number": round(
            8 * totals["upload_bytes_per_miner_and_cycle"] / report["selection"]["target_parameters"], 3
        ),
        "upload_share_of_model": round(totals["upload_share_of_model"], 4),
        "seconds": totals["seconds"],
    }
    return Result({"base": base, "cycles": cycles, "miners": 3, "validators": 3}, rows, figures)


if __name__ == "__main__":
    main("demo", run, doc=__doc__)
