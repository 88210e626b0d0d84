"""A customer's way through the platform: check, quote, submit, watch, report; then again, starting from the shelf."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from connito.base.recipes import build_cached
from connito.data.corpus import Corpus
from connito.data.manifest import Manifest
from connito.errors import Invalid
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir
from connito.platform.log import read_log
from connito.platform.session import Session
from connito.runtime.progress import silent
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.locked import unlocked
from connito.wire.sealing import MEDIA_TYPE, NoKey, parse_boxes, unsealed
from connito.workloads.fetching import holdout_refs

from tests.support.desk_files import docstrings, functions, quiz, rows
from tests.support.elsewhere import Elsewhere, completed, models
from tests.support.hub import Hub

from .conftest import environment
from .test_detached import SMALL, Platform, until_finished

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

POLICIES = {"scoring": {"confidence": 0.9}, "training": {"local_steps": 24}}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A customer's folder: two sources, general text, a benchmark, and jobs over them."""
    import argparse
    import decimal
    import email.message
    import pathlib
    import statistics
    import tarfile
    import zipfile

    folder = tmp_path_factory.mktemp("desk")
    (folder / "files").mkdir()
    for number, text in enumerate(functions(statistics, shutil)):
        (folder / "files" / f"{number:03}.txt").write_text(text)
    rows(folder / "more.jsonl", functions(argparse, tarfile, zipfile, ast))
    rows(folder / "exam.jsonl", functions(inspect)[:40])
    quiz(folder / "quiz")
    rows(folder / "prose.jsonl", docstrings(decimal, pathlib, email.message, argparse, statistics, inspect))
    job(folder)
    return folder


def job(folder: Path, name: str = "job.yaml", **changes: Any) -> Path:
    content: dict[str, Any] = {
        "domain": "python",
        "base": "tiny",
        "profile": "tiny",
        "data": [{"path": "files/"}, {"path": "more.jsonl", "text": "# {name}\n{body}", "weight": 2, "name": "more"}],
        "general": [{"domain": "prose", "path": "prose.jsonl", "text": "{body}"}],
        "benchmarks": [
            {"name": "exam", "path": "exam.jsonl", "text": "{body}"},
            {"name": "quiz", "task": "quiz/task.yaml"},
        ],
        "objective": {"max_cycles": 1},
        "budget": {"upload": "2 MB", "memory": "500 MB"},
        "privacy": {"visibility": "private"},
        "license": "PSF-2.0",
        "data_statement": "Functions of the Python standard library.",
        "policies": POLICIES,
        **changes,
    }
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """What `up --no-wait` leaves running."""
    platform = Platform(tmp_path_factory.mktemp("desk-up") / "data")
    platform.json("up", *SMALL, "--no-wait")
    try:
        until_finished(platform)
        yield platform
    finally:
        platform.connito("down")


@pytest.fixture(scope="module")
def run(platform: Platform, desk: Path) -> str:
    """A job that went through check, quote, submit and watch."""
    checked = platform.json("job", "check", str(desk / "job.yaml"))
    assert checked["ok"]
    assert {"probe", "train", "holdout", "general prose", "benchmark exam"} <= set(checked["parts"])
    quoted = platform.json("job", "quote", str(desk / "job.yaml"))
    submitted = platform.json("job", "submit", str(desk / "job.yaml"))
    watched = platform.json("job", "watch", submitted["run"])
    assert watched["phase"] == "completed", watched
    made = platform.json("job", "report", submitted["run"], "--no-measure")
    # The quote's experts are the run's: the same code on the same probe. Its bytes are those of noise, coded.
    assert quoted["layers"] == made["selection"]["layers"]
    upload = made["totals"]["upload_bytes_per_miner_and_cycle"]
    assert 0.9 * quoted["bytes"]["upload"] <= upload < 1.1 * quoted["bytes"]["upload"] + 4096
    assert quoted["pilot"]["low"] < quoted["pilot"]["gain"] < quoted["pilot"]["high"]
    return str(submitted["run"])


def test_the_delivery_report_measures_and_the_expert_loads(platform: Platform, run: str, tmp_path: Path) -> None:
    import connito
    from connito.base.loading import load_full

    out = tmp_path / "delivery"
    report = platform.json("job", "report", run, "--out", str(out), "--with-base")
    measured = {row["name"]: row for row in report["measured"]["rows"]}
    assert [measured[name]["use"] for name in ("python", "prose", "exam")] == ["target", "general", "benchmark"]
    assert measured["python"]["low"] <= measured["python"]["change"] <= measured["python"]["high"] < 0
    assert report["measured"]["apart"] < 1e-5
    assert report["license"] == "PSF-2.0"
    assert [row["label"] for row in report["contributors"]] == ["miner-1"]
    page = (out / "report.md").read_text()
    assert "connito.load_expert" in page
    assert "| exam | benchmark |" in page
    (scored,) = report["measured"]["tasks"]
    assert (scored["task"], scored["metric"], scored["items"]) == ("quiz", "acc", 12)
    assert scored["interval"][0] <= scored["score"] - scored["base"] <= scored["interval"][1]
    assert "| quiz | acc |" in page
    # The platform scored the same, before anybody asked, and it is on the record that the library signed.
    shown = platform.json("library", "show", report["expert"]["expert_id"])["record"]
    on_record = {(row["name"], row["metric"]): row for row in shown["scores"]}
    assert on_record["exam", "loss"]["after"] == pytest.approx(measured["exam"]["after"], abs=1e-5)
    assert on_record["exam", "loss"]["change_high"] == pytest.approx(measured["exam"]["high"], abs=1e-4)
    quiz = on_record["quiz", "acc"]
    assert (quiz["before"], quiz["after"], quiz["items"]) == (scored["base"], scored["score"], 12)
    assert "unscored" not in shown
    assert "quiz acc" in platform.connito("library", "list").stdout
    loaded = connito.load_expert(load_full(out / "base"), out / "expert")
    assert loaded.changed
    verified = platform.json("library", "verify", str(out / "expert"), "--base", str(out / "base"))
    assert not [line for line in verified["verified"] if "nobody" in line]
    assert len(verified["verified"]) > 2
    record = json.loads((out / "expert" / "record.json").read_text())
    assert record["governance"]["visibility"] == "private"
    assert {"files", "more"} < set(record["governance"]["sources"])


async def _facts(platform: Platform, run: str) -> tuple[RunFacts, Session]:
    session = Session.open(platform.data, role="operator")
    async with session.bus() as bus:
        return (await read_log(bus, session.roster, run)).runs[run], session


async def test_what_miners_upload_for_a_job_is_noise_without_the_key_of_its_reveal(
    platform: Platform, run: str, tmp_path: Path
) -> None:
    facts, session = await _facts(platform, run)
    entries = facts.window("submit", 1).submissions
    assert entries
    for entry in entries:
        stored = await session.store().fetch(entry.artifact)
        assert stored.read_bytes().startswith(b"connito.v1.locked\n")
        clear = unlocked(stored, entry.artifact, tmp_path)
        assert hashlib.sha256(clear.read_bytes()).hexdigest() == entry.artifact.content
        assert clear.read_bytes()[64:] not in stored.read_bytes()
        wrong = ArtifactRef()
        wrong.CopyFrom(entry.artifact)
        wrong.key = bytes(32)
        with pytest.raises(Invalid, match="not the one that the upload was locked with"):
            unlocked(stored, wrong, tmp_path)


async def test_whoever_leaks_the_store_reads_nothing_of_a_private_expert(
    platform: Platform, run: str, tmp_path: Path
) -> None:
    """Every object of the bucket, raw, is searched for what the expert consists of, and for what is said of it."""
    facts, session = await _facts(platform, run)
    (deposit,), store = [fact.message for fact in facts.deposits.values()], session.store()
    spec, made = facts.require_spec(), [*facts.versions.values()][-1]
    whole = [deposit.expert, made.state, made.outer_state, made.step, spec.train.artifact, spec.probe.artifact]
    text = [deposit.record, deposit.attestation, facts.require_selection().report]
    manifest = Manifest.from_bytes(await store.get_bytes(spec.base.manifest))
    base = b"".join([await store.get_bytes(entry.ref) for entry in manifest.files.values()])
    said = {run, spec.data_statement, deposit.expert_id, deposit.expert.digest, made.state.digest}
    needles = {word.encode() for word in said}
    for ref in whole:
        data = await store.get_bytes(ref)
        assert hashlib.sha256(data).hexdigest() == ref.digest
        # Of numbers, from where a file has some: a pair of pages of it, not what every header begins with.
        needles |= {data[at : at + 48] for at in range(len(data) // 2, len(data) - 48, 1 + len(data) // 64)}
    needles = {needle for needle in needles if len(set(needle)) > 8 and needle not in base}
    found, names = [], await store.objects()
    for one in names:
        raw = await asyncio.to_thread(store._read, one.key, 0, 0, 1 << 30)
        found += [(one.key, needle[:20]) for needle in needles if needle in raw]
        if one.key.startswith("private/"):
            assert raw.startswith(b"connito.v1.private\n")
    assert not found
    assert len(needles) > 100
    private = {one.digest for one in names if one.key.startswith(f"private/{spec.secret.digest}/")}
    assert private >= {ref.digest for ref in (*whole, *text) if ref.digest}


async def test_a_validator_that_is_admitted_late_reads_the_hold_outs_that_are_lent_to_it(
    platform: Platform, run: str, tmp_path: Path
) -> None:
    late, file = Identity.generate(), tmp_path / "lent.json"
    refused = platform.connito("access", "lend", run, late.public, str(file))
    assert (refused.returncode, file.exists()) == (3, False), refused.stderr
    assert "is no validator of the roster" in refused.stderr
    facts, session = await _facts(platform, run)
    spec, place = facts.require_spec(), DataDir.at(platform.data).roster
    before = place.read_text()
    roster = json.loads(before)
    roster["keys"]["validator"] = [*roster["keys"]["validator"], late.public]
    place.write_text(json.dumps(roster))
    try:
        platform.json("access", "lend", run, late.public, str(file))
    finally:
        place.write_text(before)
    assert file.stat().st_mode & 0o777 == 0o600
    lent = parse_boxes(file.read_bytes(), str(file))
    refs = [ref for ref in holdout_refs(spec).values() if ref.media_type == MEDIA_TYPE]
    assert lent["reader"] == late.public
    assert set(lent) - {"reader"} == {spec.secret.digest, *(ref.digest for ref in refs)}
    for ref in refs:
        sealed = tmp_path / ref.digest
        shutil.copyfile(await session.store().fetch(ref), sealed)
        with pytest.raises(NoKey):
            unsealed(sealed, ref, late, spec.customer)
        assert Corpus.load(unsealed(sealed, ref, late, spec.customer, lent).read_bytes())
        with pytest.raises(Invalid):
            unsealed(sealed, ref, Identity.generate(), spec.customer, lent)


@pytest.mark.timeout(700)
def test_a_private_expert_is_its_owners_from_everywhere_and_nobody_elses(
    platform: Platform, run: str, desk: Path, tmp_path: Path
) -> None:
    """The owner has a key and an address, and so has another customer; neither has the platform's folder."""
    data, base, text = DataDir.at(platform.data), build_cached("tiny", silent) / "model", tmp_path / "prose.txt"
    prose = [json.loads(row)["body"] for row in (desk / "prose.jsonl").read_text().splitlines()]
    text.write_text("\n\n".join(prose)[:20_000])
    other = Accounts(data.root).welcome("customer", Identity.generate())
    roster = json.loads(before := data.roster.read_text())
    roster["keys"]["customer"] = [*roster["keys"]["customer"], other.public]
    data.roster.write_text(json.dumps(roster))
    try:
        owner = Elsewhere(tmp_path / "owner", Identity.load(data.keys / "customer.nk"), data, environment())
        stranger = Elsewhere(tmp_path / "stranger", other, data, environment())
    finally:
        data.roster.write_text(before)
    (expert,) = [row["expert_id"] for row in owner.json("library", "list")["experts"] if row["run"] == run]
    shrink = ("--base", base, "--data", text, "--method", "router-weighted", "--max-experts", 16)
    verbs: dict[str, tuple[object, ...]] = {
        "show": ("library", "show", expert),
        "export": ("library", "export", expert, "--out", "exported"),
        "prune": ("library", "prune", *shrink, "--with", expert, "--out", "pruned"),
        "evaluate": ("evaluate", expert, "--base", base, "--cloze", f"prose={text}", "--limit", 4),
        "push": ("library", "push", expert, "ada/python"),
    }
    assert expert not in str(stranger.json("library", "list"))
    with Hub() as hub:
        for name, verb in verbs.items():
            done = stranger.connito(*verb, hub=hub)
            assert (name, done.returncode) in ((name, 3), (name, 4)), done.stdout + done.stderr
            (said,) = [line for line in done.stderr.splitlines() if "no expert" in line]
            assert done.stderr.splitlines()[-1] == said
            assert "Traceback" not in done.stderr
        assert not hub.repositories
        found = {name: owner.json(*verb, hub=hub) for name, verb in verbs.items()}
        assert hub.repositories["ada/python"].private
    assert not [path.name for path in stranger.folder.iterdir() if path.name in ("exported", "pruned")]
    assert found["show"]["record"]["governance"]["visibility"] == "private"
    assert found["prune"]["governance"]["visibility"] == "private"
    assert found["evaluate"]["scores"]
    digest = found["show"]["record"]["expert"]["digest"]
    assert hashlib.sha256((owner.folder / "exported" / "expert.safetensors").read_bytes()).hexdigest() == digest
    served_to(owner, stranger, expert, base)


def served_to(owner: Elsewhere, stranger: Elsewhere, expert: str, base: Path) -> None:
    """A server of the owner's lists and answers to keys that may see the expert, a stranger's to nobody."""
    name = f"tiny+{expert}"
    users = [{"key": "owner" * 4, "name": owner.key}, {"key": "other" * 4, "name": stranger.key}]
    (owner.folder / "users.yaml").write_text(json.dumps(users))
    options = ("--base", base, "--name", "tiny")
    with owner.serving(*options, "--keys", "users.yaml") as its, stranger.serving(*options) as theirs:
        assert {"tiny", name} <= set(models(its, "owner" * 4))
        assert completed(its, name, "owner" * 4)[0] == 200
        for address, key in ((its, "other" * 4), (theirs, "none")):
            listed = models(address, key)
            assert "tiny" in listed
            assert name not in listed
            assert completed(address, "tiny", key)[0] == 200
            status, said = completed(address, name, key)
            assert (status, "does not exist or you may not use it" in said) == (404, True)


def test_the_next_job_starts_from_the_shelf_and_the_audit_chooses_again(
    platform: Platform, desk: Path, run: str
) -> None:
    platform.json("job", "report", run, "--no-measure")
    again = job(desk, "again.yaml", objective={"max_cycles": 1}, start_from="auto")
    submitted = platform.json("job", "submit", str(again))
    assert platform.json("job", "watch", submitted["run"])["phase"] == "completed"
    report = platform.json("job", "report", submitted["run"])
    parent = platform.json("job", "report", run, "--no-measure")["expert"]["expert_id"]
    assert report["start"]["expert_id"] == parent
    target = report["measured"]["rows"][0]
    assert target["start"] < target["before"]
    experts = {expert["run"]: expert["expert_id"] for expert in platform.json("library", "list")["experts"]}
    if report["expert"] is not None:
        record = platform.json("library", "show", experts[submitted["run"]])["record"]
        assert record["started_from"]["expert_id"] == parent
    audited = platform.json("audit", submitted["run"])
    assert audited["differences"] == []


def test_a_composition_in_the_library_starts_a_job_whose_miners_take_muons_steps(
    platform: Platform, desk: Path, run: str, tmp_path: Path
) -> None:
    experts = [expert["expert_id"] for expert in platform.json("library", "list")["experts"]][:2]
    base, made = build_cached("tiny", silent) / "model", tmp_path / "made"
    composed = platform.json("library", "compose", *experts, "--base", str(base), "--out", str(made))["expert_id"]
    platform.json("library", "deposit", str(made))
    policies = {**POLICIES, "training": {"local_steps": 24, "optimizer": "muon"}}
    third = job(desk, "third.yaml", objective={"max_cycles": 1}, start_from=composed, policies=policies)
    submitted = platform.json("job", "submit", str(third))
    watched = platform.connito("job", "watch", submitted["run"], "--json")
    assert json.loads(watched.stdout)["phase"] in ("completed", "no-improvement"), watched.stderr
    report = platform.json("job", "report", submitted["run"])
    assert report["start"]["expert_id"] == composed
    assert report["measured"]["rows"][0]["start"] < report["measured"]["rows"][0]["before"]
    audited = platform.json("audit", submitted["run"])
    assert audited["differences"] == []


def test_the_demand_signal_knows_what_was_trained_and_searched_for(platform: Platform, run: str) -> None:
    platform.connito("library", "search", "astronomy")
    domains = {row["domain"]: row for row in platform.json("library", "demand")["domains"]}
    assert domains["python"]["last_cycle"] > 0
    assert domains["python"]["expected"] > 0
    assert (domains["astronomy"]["misses"], domains["astronomy"]["experts"]) == (1, 0)
    assert domains["astronomy"]["basis"].startswith("never trained")


def test_from_python(platform: Platform, desk: Path, run: str) -> None:
    import connito

    with connito.Client.local(platform.data) as client:
        assert client.job.check(desk / "job.yaml").ok
        assert client.job.report(run, measure=False)["run"] == run


BAD: list[tuple[dict[str, Any], str]] = [
    ({"data": [{"path": "nowhere/*.txt"}]}, "nothing matches"),
    ({"data": [{"path": "empty.txt"}]}, "holds no text"),
    ({"data": [{"path": "copies.jsonl", "text": "{body}"}]}, "49 of 50 documents repeat another one"),
    ({"holdout": [{"path": "more.jsonl", "text": "{body}"}]}, "also occur in the training data"),
    ({"data": [{"path": "more.jsonl", "text": "{corpse}"}]}, "no field 'corpse' that the template asks for"),
    ({"license": "Apache 2.0"}, "did you mean Apache-2.0?"),
    ({"budget": {"upload": "1 kB"}}, "one expert of this base has"),
    ({"data": [{"path": "prose.jsonl", "text": "{name}"}]}, "sequences"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_what_is_wrong_with_a_job_is_told_with_a_remedy(
    platform: Platform, desk: Path, change: dict[str, Any], said: str
) -> None:
    from connito.errors import Invalid
    from connito.jobs.check import check_file
    from connito.jobs.findings import require

    (desk / "empty.txt").write_text("")
    rows(desk / "copies.jsonl", ["def same(x):\n    return x + 1 if x else other(x, 2, 3, 4)\n"] * 50)
    checked = check_file(job(desk, "bad.yaml", **change), platform.data)
    assert not checked.ok
    with pytest.raises(Invalid) as caught:
        require(checked.findings)
    assert said in str(caught.value)
    assert all(finding.remedy for finding in checked.findings if finding.level == "error")


def test_a_bad_job_is_refused_before_anything_is_spent(platform: Platform, desk: Path) -> None:
    before = platform.json("job", "list")
    bad = str(job(desk, "refused.yaml", license="Apache 2.0"))
    for verb in ("check", "submit"):
        done = platform.connito("job", verb, bad)
        assert (verb, done.returncode) == (verb, 3), done.stdout + done.stderr
        assert "did you mean Apache-2.0?" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert platform.json("job", "list") == before
