"""Bases that are built once for a machine: as they were built, or not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from connito.base.recipes import build_cached, cached_manifest, is_whole
from connito.base.upload import upload_base
from connito.errors import Invalid
from connito.store import ArtifactStore, ref_of_bytes
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
