"""The miner's units, as systemd itself reads them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[3] / "deploy/trainer"


def verify(folder: Path, *, gpu: bool = False, change: tuple[str, str] = ("", "")) -> str:
    """What systemd says of the units where the programs that they start exist; empty if all is well."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NO UNIT WAS READ: systemd is not installed")
    for path in (*UNITS.glob("*.service"), *UNITS.glob("*.timer")):
        text = (
            path.read_text()
            .replace("/opt/connito/bin/connito", "/bin/true")
            .replace("/opt/connito/bin/pip", "/bin/true")
        )
        (folder / path.name).write_text(text.replace(*change) if change[0] else text)
    if gpu:
        (folder / "connito-trainer.service.d").mkdir()
        shutil.copyfile(UNITS / "gpu.conf", folder / "connito-trainer.service.d/gpu.conf")
    names = [str(path) for path in sorted(folder.iterdir()) if path.is_file()]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], check=False, capture_output=True, text=True
    )
    # Units of the machine that runs the test are not ours.
    return "\n".join(line for line in done.stderr.splitlines() if "connito" in line)


@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_takes_the_units(tmp_path: Path, gpu: bool) -> None:
    assert verify(tmp_path, gpu=gpu) == ""


def test_the_package_comes_from_where_its_owner_says() -> None:
    starts = (UNITS / "connito-trainer-update.service").read_text().splitlines()
    assert [line for line in starts if "pip install" in line] == [
        "ExecStart=/opt/connito/bin/pip install --upgrade ${CONNITO_PACKAGE}"
    ]
    assert "EnvironmentFile=/etc/connito/update.env" in starts


@pytest.mark.parametrize(("wrong", "said"), [
    (("Restart=always", "Restart=allways"), "allways"),
    (("ProtectSystem=strict", "ProtectSytem=strict"), "ProtectSytem"),
    (("OnCalendar=weekly", "OnCalendar=wekly"), "wekly"),
    (("/bin/true miner run", "/opt/none miner run"), "/opt/none"),
])  # fmt: skip
def test_a_mistake_would_be_found(tmp_path: Path, wrong: tuple[str, str], said: str) -> None:
    assert said in verify(tmp_path, change=wrong)
