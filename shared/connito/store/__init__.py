"""Artifacts: content-addressed objects in any S3 store, and the local cache in front of it."""

from __future__ import annotations

from connito.store.artifacts import ArtifactStore
from connito.store.named import key_of, ref_of_bytes, ref_of_file
from connito.store.presigned import get_presigned, put_presigned

__all__ = ["ArtifactStore", "get_presigned", "key_of", "put_presigned", "ref_of_bytes", "ref_of_file"]
