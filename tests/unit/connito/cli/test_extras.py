"""Without an extra, a command that needs it is one sentence that names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from connito.runtime.extras import EXTRA

from tests.support.hiding import HIDING
from tests.support.models import save_random

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands ask for: text, a job, a base, a task."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "hiding").mkdir()
    (folder / "hiding/sitecustomize.py").write_text(HIDING)
    save_random(folder / "base")
    (folder / "text.txt").write_text("A text of some words.\n\n" * 50)
    (folder / "text.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    (folder / "text.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(64))
    (folder / "task.yaml").write_text("task: quiz\ndataset_path: json\n")
    job = {
        "domain": "words",
        "base": "base",
        "data": [{"path": "text.txt"}],
        "license": "MIT",
        "data_statement": "Words.",
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    for kind in ("parquet", "zst"):
        (folder / f"{kind}.yaml").write_text(json.dumps({**job, "data": [{"path": f"text.{kind}"}]}))
    (folder / "s3.yaml").write_text(json.dumps({**job, "data": [{"path": "s3://bucket/text.txt"}]}))
    return folder


def hidden(place: Path, modules: set[str], *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")}
    path = os.pathsep.join([str(place / "hiding"), str(ROOT / "shared"), str(ROOT)])
    environment = (
        kept | {"PYTHONPATH": path, "HIDDEN": " ".join(sorted(modules)), "CONNITO_DATA_DIR": str(place / "none")} | more
    )
    return subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def of(*extras: str) -> set[str]:
    return {module for module, extra in EXTRA.items() if extra in extras}


# By command: what is hidden, and the extra that is named.
NEEDS: dict[str, tuple[str, str]] = {
    "base build --from base --out built --data words=text.txt": ("model", "model"),
    "job check parquet.yaml": ("data", "data"),
    "job check zst.yaml": ("data", "data"),
    "job check s3.yaml": ("data", "data"),
    "library extract --base base --data text.txt --out out": ("model", "model"),
    "library pull nobody/nothing --out pulled": ("model", "model"),
    "serve --base base": ("model", "model"),
    "serve --base base --port 0": ("serve", "model,serve"),
    "up --base tiny": ("demo", "demo"),
    "up --base tiny --cycles 1": ("model", "model"),
}


@pytest.mark.parametrize("command", NEEDS)
def test_a_command_without_its_extra_is_one_sentence(place: Path, command: str) -> None:
    extra, named = NEEDS[command]
    done = hidden(place, of(extra), "-m", "connito.cli", *command.split())
    assert done.returncode not in (0, 1), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert f"connito[{named}]" in done.stderr + done.stdout, (done.stdout, done.stderr)
