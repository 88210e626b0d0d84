"""A base model's folder: described, and put into a platform's store."""

from __future__ import annotations

import asyncio
from pathlib import Path

from connito.base.checks import check_base, check_files
from connito.base.upload import upload_base
from connito.data.manifest import Manifest, build_manifest
from connito.errors import Invalid, NotFound
from connito.platform.session import Session
from connito.v1.artifacts_pb2 import ArtifactRef


def show(folder: Path, name: str = "") -> Manifest:
    """Check the base by its headers, then read it once from front to back. Raises `NotFound` and `Invalid`."""
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}; `connito base build` makes one")
    check_base(folder)
    return build_manifest(folder, name)


def import_(folder: Path, data_dir: Path | None = None, name: str = "") -> tuple[Manifest, ArtifactRef]:
    """Put a base and its manifest into the platform's store; returns both. A RunSpec names it by the manifest's digest."""
    manifest = show(folder, name)
    store = Session.open(data_dir, role="customer").store()
    return manifest, asyncio.run(upload_base(store, folder, manifest))


def rewrite(folder: Path, out: Path) -> None:
    """Let transformers rename and fuse, and save the result under the model's own names. Holds the whole model."""
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_full, load_tokenizer
    from connito.moe.layout import require_moe_layers

    check_files(folder)
    if out.exists():
        raise Invalid(f"{out} exists; choose another folder for --rewrite, or remove it")
    model = load_full(folder)
    require_moe_layers(model)
    save_checkpoint(model, out, load_tokenizer(folder))
