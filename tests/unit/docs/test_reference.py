from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    subprocess.run([sys.executable, "scripts/generate-reference", str(out)], cwd=ROOT, check=True)
    return out


@pytest.mark.parametrize("page", ["cli.md", "events.md", "policies.md", "reason-codes.md", "settings.md"])
def test_the_reference_is_current(fresh: Path, page: str) -> None:
    current = (ROOT / "docs/reference" / page).read_text()
    assert (fresh / page).read_text() == current, "run scripts/generate-reference and commit the result"


def test_every_reason_is_documented(fresh: Path) -> None:
    from connito.v1.reasons_pb2 import Reason
    from connito.wire.enums import reason_name

    page = (fresh / "reason-codes.md").read_text()
    for number in Reason.values():
        if number:
            assert f"| `{reason_name(number)}` |" in page


def test_every_policy_is_documented_with_its_meaning(fresh: Path) -> None:
    from connito.protocol.policy.law import LAW

    page = (fresh / "policies.md").read_text()
    for path in LAW:
        policy, _, name = path.partition(".")
        section = page.partition(f"## {policy}\n")[2].partition("\n## ")[0]
        row = next(line for line in section.splitlines() if line.startswith(f"| `{name}` |"))
        assert len(row.replace("\\|", "").split(" | ")) == 4, row
        assert row.rpartition(" | ")[2].strip(" |"), row
