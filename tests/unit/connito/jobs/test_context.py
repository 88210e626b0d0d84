"""Whose base a name means, and whose held-out text a job measures forgetting on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import pytest
from connito.data.manifest import FileEntry, Manifest
from connito.errors import NotFound
from connito.jobs import check, context
from connito.jobs.spec import parse_job
from connito.platform.session import Session
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import FactKey

ME, OTHER, MALLORY = (Identity.generate(bytes([n]) * 32) for n in (1, 2, 3))


class Platform:
    """A log of runs, and a store that keeps their manifests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.fetched = folder, Log(Roster()), list[str]()
        self.identity = ME

    async def fetch(self, ref: ArtifactRef, run: str) -> Path:
        assert self.log.runs[run].require_spec().base.manifest == ref, "because of a run that names it"
        self.fetched.append(ref.digest)
        return self.folder / ref.digest

    def manifest(self, mark: str) -> ArtifactRef:
        entry = FileEntry("config.json", hashlib.sha256(mark.encode()).hexdigest(), 2, "")
        raw = Manifest({"config.json": entry}, {}, "base").to_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        (self.folder / digest).write_bytes(raw)
        return ArtifactRef(digest=digest, size=len(raw), realm=REALM_PUBLIC)

    def run(self, customer: Identity, manifest: ArtifactRef, domain: str, visibility: str = "public") -> str:
        name = f"r{len(self.log.runs)}"
        held = ArtifactRef(digest=hashlib.sha256(name.encode()).hexdigest(), size=1, realm=REALM_HOLDOUT)
        spec = run_pb2.RunSpec(run=name, customer=customer.public, domain=domain, visibility=visibility)
        spec.base.CopyFrom(run_pb2.BaseRef(name="big", manifest=manifest))
        spec.holdout.CopyFrom(run_pb2.CorpusRef(domain=domain, artifact=held))
        facts = self.log.runs[name] = RunFacts(name)
        created = run_pb2.RunCreated(spec=spec)
        facts.add(Fact(name, FactKey("run", 0, "created"), created, "", "RUNS", len(self.log.runs), 0))
        return held.digest

    def looked_up(self, base: str = "big", root: Path | None = None) -> context.JobContext | None:
        job = parse_job({"domain": "contracts", "base": base, "data": [{"path": "x"}], "license": "MIT"})
        return context._from_platform(job, root or self.folder, cast(Session, self), self.log)


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setattr(context, "CustomerStore", lambda session: session)
    return Platform(tmp_path)


def digest_of(found: context.JobContext | None) -> str:
    assert found is not None
    return found.manifest.digest


def test_nobody_elses_hold_out_becomes_a_general_one(platform: Platform) -> None:
    base = platform.manifest("good")
    for visibility in ("private", "organisation", "public"):
        platform.run(OTHER, base, f"oncology-{visibility}", visibility)
    mine = platform.run(ME, base, "letters")
    platform.run(ME, base, "contracts")
    found = platform.looked_up()
    assert found is not None
    assert [(corpus.domain, corpus.artifact.digest) for corpus in found.general] == [("letters", mine)]
    assert platform.fetched == [base.digest], "and nobody else's is downloaded"
    assert found.sources == {mine: "r3"}


def test_the_newest_run_cannot_take_a_name_over(platform: Platform) -> None:
    good, evil = platform.manifest("good"), platform.manifest("evil")
    platform.run(OTHER, good, "a")
    platform.run(MALLORY, evil, "b")
    found = platform.looked_up()
    assert digest_of(found) == good.digest
    assert found is not None
    assert found.lender == "r0"
    (finding,) = check._lent(found)
    assert (finding.level, good.digest in finding.remedy) == ("warning", True)


def test_ones_own_run_says_what_a_name_means(platform: Platform) -> None:
    first, own = platform.manifest("first"), platform.manifest("own")
    platform.run(MALLORY, first, "a")
    platform.run(ME, own, "b", "private")
    found = platform.looked_up()
    assert digest_of(found) == own.digest
    assert found is not None
    assert found.lender == ""


def test_what_lies_on_this_machine_comes_before_what_others_call_so(platform: Platform) -> None:
    platform.run(MALLORY, platform.manifest("evil"), "a")
    (platform.folder / "big").mkdir()
    (platform.folder / "big" / "config.json").write_text("{}")
    assert platform.looked_up() is None


def test_a_base_one_level_too_high_names_the_folder_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_session", lambda _: None)
    (tmp_path / "big" / "model").mkdir(parents=True)
    (tmp_path / "big" / "model" / "config.json").write_text("{}")
    job = parse_job({"domain": "contracts", "base": "big", "data": [{"path": "x"}], "license": "MIT"})
    with pytest.raises(NotFound, match=f"the model is in {tmp_path / 'big' / 'model'}: name that folder"):
        context.open_context(job, tmp_path, None)
    with pytest.raises(NotFound, match="nor demo or tiny, nor a folder of this machine"):
        context.open_context(job.model_copy(update={"base": "bigger"}), tmp_path, None)


@pytest.mark.parametrize("visibility", ["private", "organisation"])
def test_what_others_keep_to_themselves_is_not_there(platform: Platform, visibility: str) -> None:
    platform.run(OTHER, platform.manifest("secret"), "a", visibility)
    assert platform.looked_up() is None


def test_a_digest_names_one_base_for_everybody(platform: Platform) -> None:
    first, second = platform.manifest("first"), platform.manifest("second")
    platform.run(OTHER, first, "a")
    platform.run(OTHER, second, "b")
    found: Any = platform.looked_up(second.digest)
    assert (digest_of(found), found.name) == (second.digest, "big")
