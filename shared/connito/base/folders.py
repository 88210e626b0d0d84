"""A base model's folder: described, and put into a platform's store."""

from __future__ import annotations

import shutil
from pathlib import Path

from connito.base.checks import check_base
from connito.base.description import build_manifest
from connito.base.upload import upload_base
from connito.data.checkpoint_files import find_checkpoint, read_headers
from connito.data.manifest import Manifest
from connito.errors import Invalid
from connito.platform.session import Session
from connito.runtime.tasks import blocking
from connito.service.customer_store import CustomerStore
from connito.v1.artifacts_pb2 import ArtifactRef


def show(folder: Path, name: str = "") -> Manifest:
    """Check the base by its headers, then read it once from front to back. Raises `NotFound` and `Invalid`."""
    check_base(folder)
    return build_manifest(folder, name)


def left_alone(folder: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Return what lies in a base's folder and is not part of it: other files, and tensors that the model has no place for."""
    files = find_checkpoint(folder)
    return list(files.ignored), sorted(set(read_headers(files)) - set(manifest.tensors))


def import_(folder: Path, data_dir: Path | None = None, name: str = "") -> tuple[Manifest, ArtifactRef]:
    """Put a base and its manifest into the platform's store; returns both. A RunSpec names it by the manifest's digest."""
    manifest = show(folder, name)
    store = CustomerStore(Session.open(data_dir, role="customer"))
    return manifest, blocking(upload_base(store, folder, manifest))


def rewrite(folder: Path, out: Path) -> None:
    """Let transformers rename and fuse, and save the result under the model's own names. Holds the whole model."""
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_full, load_tokenizer
    from connito.moe.layout import require_moe_layers

    files = find_checkpoint(folder)
    if out.exists():
        raise Invalid(f"{out} exists; choose another folder for --rewrite, or remove it")
    model = load_full(folder)
    require_moe_layers(model)
    save_checkpoint(model, out, load_tokenizer(folder))
    if "generation_config.json" in files.paths:
        shutil.copy(files.paths["generation_config.json"], out / "generation_config.json")
