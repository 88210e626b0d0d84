"""A run recorded under protocol version 0, whose outcomes are sentences, audited by today's code under its own rules.

`tests/data/recorded-run.tar.xz` is what `connito up` left of two cycles with two miners, a copier, one that sent NaNs, and
two validators: log, objects and roster, without any key.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from connito.audit.access import opened
from connito.v1 import cycle_pb2
from connito.views import sentences
from connito.views.run_report import run_report

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

RECORDED = Path(__file__).parents[1] / "data" / "recorded-run.tar.xz"
RUN = "recipes-s5"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "data"
    with tarfile.open(RECORDED) as archive:
        # The first releases of 3.11 have no filters.
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    (folder / "keys").mkdir()
    (folder / "keys" / "store.secret").write_text(secrets.token_hex(20))
    return folder


def audited(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "connito.cli", "audit", RUN, "--from", str(folder), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_everything_but_the_model_comes_out_to_the_bit(recorded: Path) -> None:
    document = audited(recorded, "--no-model")

    assert (document["result"], document["differences"]) == ("same", [])
    assert {"verdicts", "merge", "reports", "gate", "expert"} <= {check["check"] for check in document["checks"]}


def test_measured_again_it_is_the_same(recorded: Path) -> None:
    document = audited(recorded, "--threads", "1")

    # Digests over what the probe routes hold floating-point sums of the processor that the run was recorded on.
    assert [found for found in document["differences"] if found["check"] != "selection"] == []
    assert any(check["check"] == "losses" and check["compared"] for check in document["checks"])


async def test_what_it_recorded_as_sentences_is_shown_as_recorded(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentences, "SENTENCES", {})
    async with opened(recorded, None) as access:
        facts = (await access.evidence(RUN)).facts

    rows = {row["miner"]: row for row in run_report(facts)["cycles"][0]["submissions"]}

    assert rows["copier-1"]["detail"].endswith("… committed earlier")
    assert rows["nan-1"]["detail"].endswith("holds infinities or NaNs")
    scored = facts.scored(1)
    assert scored is not None
    assert not any(outcome.HasField("finding") for outcome in scored.verdicts)
    copied = next(verdict for verdict in scored.verdicts if verdict.status == cycle_pb2.VERDICT_STATUS_REJECTED)
    assert copied.detail == rows["copier-1"]["detail"]
