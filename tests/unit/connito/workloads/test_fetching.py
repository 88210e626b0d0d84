"""The one loader of what a run is computed on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from connito.data.manifest import FileEntry, Manifest
from connito.errors import Invalid, NotFound
from connito.v1 import artifacts_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef
from connito.v1.run_pb2 import CorpusRef, RunSpec
from connito.wire.identity import Identity
from connito.wire.sealing import MEDIA_TYPE, lend, seal_file
from connito.workloads.fetching import fetch_base, fetch_holdouts

ME, CUSTOMER = Identity.generate(b"m" * 32), Identity.generate(b"c" * 32)


class Folder:
    """Artifacts as files named by realm and digest."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes, realm: artifacts_pb2.Realm.ValueType) -> ArtifactRef:
        ref = ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=len(data), realm=realm)
        self._path(ref).write_bytes(data)
        return ref

    async def fetch(self, ref: ArtifactRef) -> Path:
        if not self._path(ref).exists():
            raise NotFound(f"no {ref.digest}")
        return self._path(ref)

    def _path(self, ref: ArtifactRef) -> Path:
        return self.root / f"{ref.realm}-{ref.digest}"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def a_run(folder: Folder) -> RunSpec:
    files = {}
    for name in ("config.json", "model.safetensors"):
        ref = folder.put(name.encode(), REALM_PUBLIC)
        files[name] = FileEntry(name, ref.digest, ref.size, "application/json")
    manifest = folder.put(Manifest(files, {}, "base", {}).to_bytes(), REALM_PUBLIC)
    spec = RunSpec(holdout=CorpusRef(domain="medical", artifact=folder.put(b"m", REALM_HOLDOUT)))
    spec.base.manifest.CopyFrom(manifest)
    for domain in ("code", "prose"):
        spec.general_holdouts.append(CorpusRef(domain=domain, artifact=folder.put(domain.encode(), REALM_HOLDOUT)))
    return spec


async def test_the_base_is_every_file_that_its_manifest_names(folder: Folder) -> None:
    base = await fetch_base(folder, a_run(folder))
    assert {name: path.read_bytes() for name, path in base.files.items()} == {
        "config.json": b"config.json",
        "model.safetensors": b"model.safetensors",
    }
    assert list(base.manifest.files) == list(base.files)


async def test_hold_outs_come_by_domain_with_the_target_first(folder: Folder) -> None:
    found = await fetch_holdouts(folder, a_run(folder), ME)
    assert [(domain, path.read_bytes()) for domain, path in found.items()] == [
        ("medical", b"m"),
        ("code", b"code"),
        ("prose", b"prose"),
    ]


async def test_what_is_missing_is_named(folder: Folder) -> None:
    spec = a_run(folder)
    spec.holdout.artifact.digest = "0" * 64
    with pytest.raises(NotFound, match="0000"):
        await fetch_holdouts(folder, spec, ME)


async def test_sealed_hold_outs_are_opened_for_those_who_judge_and_for_nobody_else(
    folder: Folder, tmp_path: Path
) -> None:
    spec = a_run(folder)
    spec.customer = CUSTOMER.public
    (tmp_path / "plain").write_bytes(b"held out")
    seal_file(tmp_path / "plain", tmp_path / "sealed", CUSTOMER, [ME.public])
    spec.holdout.artifact.CopyFrom(folder.put((tmp_path / "sealed").read_bytes(), REALM_HOLDOUT))
    spec.holdout.artifact.media_type = MEDIA_TYPE
    assert (await fetch_holdouts(folder, spec, ME))["medical"].read_bytes() == b"held out"
    with pytest.raises(Invalid, match="was not admitted then"):
        await fetch_holdouts(folder, spec, Identity.generate())
    late = Identity.generate()
    lent = {spec.holdout.artifact.digest: lend(tmp_path / "sealed", ME, late.public)}
    assert (await fetch_holdouts(folder, spec, late, lent))["medical"].read_bytes() == b"held out"
    spec.customer = Identity.generate().public
    with pytest.raises(Invalid, match="another than this run's customer"):
        await fetch_holdouts(folder, spec, ME)
