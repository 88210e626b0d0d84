"""A run with three honest miners and one of every misbehaving kind: who is merged, who is refused, and what changed."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest
from connito.base.recipes import cached_base

from .conftest import Finished, Up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ADVERSARIES = (
    "copier", "noisy-copier", "masked-copier", "scaled-copier", "mixed-copier", "freerider", "noise", "sign-flip",
    "large-norm", "nan", "oversized", "late",
)  # fmt: skip
HONEST = {"miner-1", "miner-2", "miner-3"}
CYCLES = (1, 2)


@pytest.fixture(scope="module")
def run(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    copy = tmp_path_factory.mktemp("copy") / "report.json"
    done = up(
        "--cycles", "2", "--miners", "3", "--validators", "3", "--seed", "7", "--adversaries", ",".join(ADVERSARIES),
        "--report", copy,
    )  # fmt: skip
    assert done.code == 0, done.explain()
    assert json.loads(copy.read_text()) == done.report
    return done


def test_stdout_is_the_report_and_nothing_else(run: Finished) -> None:
    assert json.loads(run.stdout) == run.report


@pytest.mark.parametrize("cycle", CYCLES)
def test_honest_work_is_merged_and_paid_and_nothing_else_is(run: Finished, cycle: int) -> None:
    report = run.report["cycles"][cycle - 1]
    assert set(report["merged"]) - {"late-1"} == HONEST
    assert report["gate"] == "accepted"
    paid = {row["miner"]: row["reward"] for row in report["submissions"] if row["reward"]}
    assert set(paid) - {"late-1"} == HONEST
    assert sum(paid.values()) <= 1_000_000
    for miner in HONEST:
        assert run.row(cycle, miner)["utility"] > 0.01


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize(
    ("miner", "status", "reasons"),
    [
        ("copier-1", "rejected", {"copy"}),
        ("noisy-copier-1", "rejected", {"copy"}),
        ("masked-copier-1", "rejected", {"copy"}),
        ("scaled-copier-1", "rejected", {"copy"}),
        ("mixed-copier-1", "rejected", {"copy"}),
        ("sign-flip-1", "rejected", {"no-improvement", "not-significant", "retention-broken", "copy"}),
        ("large-norm-1", "refused", {"norm-exceeded"}),
        ("freerider-1", "rejected", {"unchanged"}),
        ("noise-1", "rejected", {"no-improvement", "not-significant"}),
        ("nan-1", "refused", {"non-finite"}),
        ("oversized-1", "refused", {"oversized"}),
    ],
)
def test_whoever_breaks_a_rule_is_told_which(
    run: Finished, cycle: int, miner: str, status: str, reasons: set[str]
) -> None:
    row = run.row(cycle, miner)
    assert (row["status"], row["reason"] in reasons) == (status, True), row
    assert (row["utility"], row["rank"], row["reward"]) == (0, 0, 0)
    assert row["detail"]


def test_late_work_is_not_lost_but_scored_in_the_next_cycle(run: Finished) -> None:
    first, second = run.row(1, "late-1"), run.row(2, "late-1")
    assert (first["status"], first["reason"], first["reward"]) == ("refused", "late-reveal", 0)
    assert second["origin_cycle"] == 1
    assert second["status"] in ("merged", "scored", "rejected")


def test_the_copied_miner_loses_nothing(run: Finished) -> None:
    """The copiers take what miner-1 made; the blame goes to whoever committed later."""
    for cycle in CYCLES:
        assert run.row(cycle, "miner-1")["status"] == "merged"


def test_target_loss_falls_every_cycle_and_general_loss_stays(run: Finished) -> None:
    for cycle in run.report["cycles"]:
        assert cycle["target_loss_after"] < cycle["target_loss_before"] - 0.02
        assert abs(cycle["general_loss_after"] - cycle["general_loss_before"]) < 0.05
    first, second = run.report["cycles"]
    assert second["target_loss_before"] == pytest.approx(first["target_loss_after"])
    totals = run.report["totals"]
    assert totals["target_loss_last"] == second["target_loss_after"]
    assert 0 < totals["upload_share_of_model"] < 0.5


def test_every_tensor_outside_of_the_selection_is_bit_identical(run: Finished) -> None:
    """The library's expert in the base, against the base, tensor by tensor and expert by expert."""
    import connito
    import torch
    from connito.base.loading import load_full
    from connito.moe.layout import find_moe_layers

    folder = cached_base("tiny") / "model"
    before, after = load_full(folder), load_full(folder)
    library = run.report["library"]
    connito.load_expert(after, deposited(run, library["digest"]))
    selected = {int(layer): set(experts) for layer, experts in run.report["selection"]["layers"].items()}
    assert sum(map(len, selected.values())) == run.report["selection"]["selected"] < run.report["selection"]["total"]
    banks = {layer.experts_name: index for index, layer in find_moe_layers(before).items()}
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        layer = banks.get(name.rpartition(".")[0])
        if layer is None or layer not in selected:
            assert torch.equal(tensor, new[name]), name
            continue
        for expert in range(tensor.shape[0]):
            same = torch.equal(tensor[expert], new[name][expert])
            assert same == (expert not in selected[layer]), (name, expert)


def deposited(run: Finished, digest: str) -> Path:
    """The expert's file. The library's own upload does not pass through the cache, so its object is found by content."""
    import hashlib

    path = run.artifact(digest)
    if path.exists():
        return path
    from connito.platform.servers import ObjectStore
    from connito.store import ArtifactStore
    from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef

    secret = (run.data / "keys" / "store.secret").read_text().strip()
    with ObjectStore(run.data / "objects", secret_key=secret) as server:
        import asyncio

        store = ArtifactStore(server.url, server.access_key, secret, "connito", "us-east-1", run.data / "cache")
        size = int(run.report["library"]["bytes"])
        reference = ArtifactRef(digest=digest, size=size, realm=REALM_PUBLIC)
        found = asyncio.run(store.fetch(reference))
    assert hashlib.sha256(found.read_bytes()).hexdigest() == digest
    return found


def test_what_is_left_behind_can_be_read(run: Finished) -> None:
    ElementTree.fromstring((run.data / "loss.svg").read_text())
    ElementTree.fromstring((run.data / "proof.svg").read_text())
    text = (run.data / "proof.md").read_text()
    assert "### Written by tiny" in text
    assert "### Written after the run, on recipes" in text
    words, *_ = run.report["proof"]
    assert (words["domain"], words["what"], words["use"]) == ("recipes", "next word", "target")
    # Six cycles of a tiny model move words by less than their interval; it is well formed.
    assert words["low"] <= words["after"] - words["before"] <= words["high"]
    assert {row["domain"] for row in run.report["proof"]} == {"recipes", "logs", "poems", "ledgers"}
    for key in (run.data / "keys").iterdir():
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_nothing_keeps_running_and_nothing_had_to_be_restarted(run: Finished) -> None:
    left = [p.cmdline() for p in psutil.process_iter(["cmdline"]) if str(run.data) in " ".join(p.info["cmdline"] or [])]
    assert left == []
    assert run.report["totals"]["restarts"] == {}
    assert not (run.data / "pids.json").exists()
    assert not (run.data / "platform.json").exists()
    assert 0 < run.report["totals"]["peak_memory_bytes"] < 4_000_000_000


def test_a_miner_has_no_held_out_text_and_no_credentials(run: Finished) -> None:
    """Its cache holds public artifacts only; its log shows that it had no reason to look for more."""
    from connito.data.corpus import Corpus

    kept = [path for path in (run.data / "cache-miners").rglob("*") if path.is_file() and len(path.name) == 64]
    splits = set()
    for path in kept:
        with_header = path.read_bytes()[:4000]
        if b'"split"' in with_header:
            splits.add(Corpus.load(path).metadata["split"])
    assert splits == {"train"}
    assert "s3_secret" not in (run.data / "logs" / "miner-1.log").read_text().lower()
