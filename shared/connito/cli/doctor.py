"""`connito doctor`: is this machine ready?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit

if TYPE_CHECKING:
    from connito.local.doctor_platform import Check


def doctor(
    key: Annotated[
        Path | None,
        typer.Option("--key", help="A miner's key file: also whether the runs on offer fit, and what they pay."),
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check versions, disk, memory, GPUs and ports, and, where a platform is known, its broker, clock, store, bandwidth,
    certificates and runs; exit 5 when something is missing."""
    import os

    from connito.local import doctor as machine

    if key is not None:
        os.environ["CONNITO_KEY_FILE"] = str(key)
    checks = machine.doctor(data_dir)
    ok = all(check.ok or check.warning for check in checks)
    emit(as_json, {"ok": ok, "checks": [asdict(check) for check in checks]}, lambda: _text(checks))
    if not ok:
        raise typer.Exit(5)


def _text(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        mark = "ok     " if check.ok else "warning" if check.warning else "MISSING"
        lines.append(f"{mark}  {check.name}: {check.found}" + ("" if check.ok else f"\n         → {check.remedy}"))
    return "\n".join(lines)
