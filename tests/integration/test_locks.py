"""What the images install is on the public package index alone, for both architectures, and is named in the SBOM.

Nothing of this machine's package settings counts: uv reads neither pip's files nor its variables.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy/locks"
INDEX = "https://pypi.org/simple"
UV = Path(sys.executable).parent / "uv"
# Comes as source alone; every other file is a wheel that fits the platform.
SOURCES = {"nkeys"}


@pytest.fixture(scope="module", autouse=True)
def index() -> None:
    """The public index, or a skip that says so."""
    try:
        socket.create_connection(("pypi.org", 443), timeout=10).close()
    except OSError:
        pytest.skip("NO LOCK WAS RESOLVED: the public package index is not reachable")


def alone() -> dict[str, str]:
    """The environment of somebody who configured nothing."""
    kept = {name: value for name, value in os.environ.items() if name in {"SSL_CERT_FILE", "HTTPS_PROXY", "HOME"}}
    return {**kept, "PATH": f"{UV.parent}:/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null"}


def entries(text: str) -> dict[str, tuple[str, set[str]]]:
    """Name -> version and hashes."""
    return {
        match[1]: (match[2], set(re.findall(r"sha256:[0-9a-f]{64}", match[0])))
        for match in re.finditer(r"^([A-Za-z0-9._-]+)==(\S+)(?: \\\n +--hash=\S+)*", text, re.M)
    }


def resolve(lock: Path, architecture: str) -> subprocess.CompletedProcess[str]:
    """The same versions again, with a file for this architecture each, and the hashes that the index states."""
    command = [
        str(UV),
        "pip",
        "compile",
        "--quiet",
        "--system-certs",
        "--no-config",
        "--generate-hashes",
        "--no-header",
    ]
    command += ["--default-index", INDEX, "--no-deps", "--no-annotate", "--python-version", "3.11", "--only-binary"]
    command += [":all:", *(f"--no-binary={name}" for name in SOURCES), "--python-platform"]
    command += [f"{architecture}-manylinux_2_28", str(lock)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=alone(), timeout=120)


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=lambda lock: lock.stem)
def test_every_lock_resolves_against_the_public_index_alone(lock: Path, architecture: str) -> None:
    done = resolve(lock, architecture)
    assert done.returncode == 0, done.stderr
    offered, locked = entries(done.stdout), entries(lock.read_text())
    assert set(offered) == set(locked)
    for name, (version, hashes) in locked.items():
        assert offered[name][0] == version
        assert hashes & offered[name][1], f"no file that {lock.name} allows for {name} is on the public index"


def test_a_version_that_is_only_on_another_index_is_found_out(tmp_path: Path) -> None:
    lock = tmp_path / "torch.txt"
    lock.write_text((LOCKS / "torch.txt").read_text().replace("torch==2.13.0", "torch==2.13.0+cpu"))
    assert "torch==2.13.0+cpu" in resolve(lock, "x86_64").stderr


def test_the_sbom_names_everything_that_is_locked(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts/generate-sbom", tmp_path],
        check=False,
        capture_output=True,
        text=True,
        env=alone(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, locks in {"control": ["control"], "model-cuda": ["model", "torch", "cuda"]}.items():
        document = json.loads((tmp_path / f"{name}.cdx.json").read_text())
        assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
        listed = {(part["name"], part["version"]): part for part in document["components"]}
        for lock in locks:
            for package, (version, hashes) in entries((LOCKS / f"{lock}.txt").read_text()).items():
                stated = json.dumps(listed[(package, version)])
                assert all(digest.removeprefix("sha256:") in stated for digest in hashes)
