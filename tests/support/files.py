"""Files of tensors and folders of a base model, as tests write and read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connito.data.manifest import FileEntry, Reader
from connito.data.tensors import tensor_bytes


def write_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file."""
    path.write_bytes(tensor_bytes(tensors, metadata, dtypes=dtypes))


def directory_reader(directory: Path) -> Reader:
    """Return a reader of ranges from a local folder."""

    def read(entry: FileEntry, start: int, length: int) -> bytes:
        with (directory / entry.name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    return read
