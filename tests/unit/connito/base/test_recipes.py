"""Bases that are built once for a machine: as they were built, or not used."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any, cast

import pytest
from connito.base import description, recipes
from connito.base.recipes import Recipe, build_cached, cached_manifest, is_whole
from connito.base.upload import upload_base
from connito.data.manifest import FileEntry, Manifest
from connito.errors import Invalid
from connito.store import ArtifactStore, ref_of_bytes
from connito.store.cache import digest_of_file
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef


def silent(*_: object, **__: object) -> None: ...


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.chmod(0o600)
    path.write_bytes(data)


async def test_a_damaged_base_is_built_anew_and_never_handed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONNITO_CACHE_DIR", str(tmp_path))
    assert not is_whole("tiny")
    target = build_cached("tiny", silent)
    manifest = cached_manifest("tiny")
    assert is_whole("tiny")
    for name in ("model.safetensors", "tokenizer_config.json"):
        flip(target / "model" / name)
        assert not is_whole("tiny")

        class Store:
            async def stat(self, ref: ArtifactRef) -> None:
                return None

            async def put_file(self, path: Path, *_: Any) -> ArtifactRef:
                return ref_of_bytes(path.read_bytes(), "", REALM_PUBLIC)

        with pytest.raises(Invalid, match=f"{name} is not the file"):
            await upload_base(cast(ArtifactStore, Store()), target / "model", manifest)
        build_cached("tiny", silent)
        assert is_whole("tiny")
        assert cached_manifest("tiny") == manifest, "as it was"


def test_a_cache_that_cannot_be_made_is_named_with_the_variable_that_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONNITO_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(Invalid, match=r"cannot write .*file/cache.*set CONNITO_CACHE_DIR"):
        build_cached("tiny", silent)
    monkeypatch.delenv("CONNITO_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # A user that no list of users has, as in a container.
    with pytest.raises(Invalid, match=r"no home folder.*set HOME or CONNITO_CACHE_DIR"):
        build_cached("tiny", silent)


def test_two_that_find_a_base_damaged_build_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has looked before either builds: the second neither removes what the first has built nor stumbles over it."""
    monkeypatch.setenv("CONNITO_CACHE_DIR", str(tmp_path))
    both, built, inner = Barrier(2), list[Path](), recipes.is_whole

    def build(recipe: Recipe, out: Path, progress: object) -> None:
        out.mkdir()
        (out / "weights").write_bytes(b"whole")
        built.append(out)

    def described(folder: Path, *_: object) -> Manifest:
        digest, size = digest_of_file(folder / "weights")
        return Manifest({"weights": FileEntry("weights", digest, size, "")}, {}, "tiny")

    def looked(name: str) -> bool:
        found = inner(name)
        with suppress(BrokenBarrierError):
            both.wait(0.5)
        return found

    monkeypatch.setattr(recipes, "_build", build)
    monkeypatch.setattr(description, "build_manifest", described)
    target = build_cached("tiny", silent)
    flip(target / "model" / "weights")
    monkeypatch.setattr(recipes, "is_whole", looked)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: build_cached("tiny", silent), range(2))) == [target, target]
    assert len(built) == 2, "once at first, once anew"
    assert inner("tiny")
