"""What an operator did is shown in words."""

from __future__ import annotations

from pathlib import Path

from connito.platform.access import Access
from connito.wire.identity import Identity

from .conftest import Call


def test_keys_and_quotas_are_listed_as_words(tmp_path: Path, call: Call) -> None:
    access = Access(tmp_path)
    access.export(validators=0)
    keys = [Identity.generate().public for _ in range(2)]
    access.add(keys)
    access.enlist("clinic", Identity.generate().public, "owner", max_runs=2)
    said = call("access", "acts", str(tmp_path)).out
    assert f"keys {keys[0]} {keys[1]}" in said
    assert not set("[]{}'") & set(said)
