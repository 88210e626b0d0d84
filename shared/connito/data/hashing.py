"""Describe a checkpoint by content: read its files once from front to back and note every digest of the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from connito.data.checkpoint_files import CheckpointFiles, Header, read_headers
from connito.data.manifest import FileEntry, Manifest, Taken, TensorEntry, usual_bank
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import Invalid
from connito.v1 import reasons_pb2

MEDIA_TYPES = {".safetensors": SAFETENSORS, ".json": "application/json"}
_CHUNK = 1 << 22


def hash_checkpoint(
    files: CheckpointFiles, taken: Taken, name: str, progress: Callable[[str, float], None] | None = None
) -> Manifest:
    """Read a checkpoint's files once from front to back and describe what the model takes from them.

    Raises `Invalid` when a header is damaged.
    """
    headers, total, done = read_headers(files), sum(path.stat().st_size for path in files.paths.values()), 0
    entries: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for file, path in files.paths.items():
        here = {n: h for n, h in headers.items() if h.file == file}
        digest, found = _hash_file(path, here, taken)
        media = MEDIA_TYPES.get(path.suffix, "application/octet-stream")
        entries[file] = FileEntry(file, digest, path.stat().st_size, media)
        tensors |= {n: entry for n, entry in found.items() if n in taken.dtypes}
        done += path.stat().st_size
        if progress is not None:
            progress("hashing the base", done / total)
    return Manifest(entries, tensors, name, _extra(tensors, taken))


def _extra(tensors: Mapping[str, TensorEntry], taken: Taken) -> dict[str, str]:
    banks = {name: taken.banks.get(name) for name in tensors if taken.banks.get(name) != usual_bank(name)}
    other = {name: dtype for name, dtype in taken.dtypes.items() if dtype != tensors[name].dtype}
    extra = {"dtype": taken.dtype} if taken.dtype else {}
    if taken.quantised:
        extra["quantised"] = taken.quantised
    if banks:
        extra["banks"] = _json({n: bank and [bank.layer, bank.part, bank.expert] for n, bank in banks.items()})
    if other:
        counts = [*taken.dtypes.values()]
        most = max(sorted(set(counts)), key=counts.count)
        extra["dtypes"] = _json({"": most} | {n: dtype for n, dtype in taken.dtypes.items() if dtype != most})
    return extra


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _hash_file(path: Path, headers: Mapping[str, Header], taken: Taken) -> tuple[str, dict[str, TensorEntry]]:
    """Return (digest of the file, its tensors)."""
    whole, tensors = hashlib.sha256(), {}
    with path.open("rb") as file:
        for name, header in sorted(headers.items(), key=lambda item: (item[1].start, item[1].length)):
            for chunk in _chunks(file, header.start - file.tell()):
                whole.update(chunk)
            bank = taken.banks.get(name)
            rows = header.shape[0] if bank is not None and bank.expert is None else 0
            digest, of_rows = _hash_tensor(file, header.length, rows, whole)
            tensors[name] = TensorEntry(
                name, header.file, header.dtype, header.shape, header.start, header.length, digest, of_rows
            )
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest(), tensors


def _hash_tensor(file: BinaryIO, length: int, rows: int, whole: Any) -> tuple[str, tuple[str, ...]]:
    tensor, found = hashlib.sha256(), []
    for _ in range(max(1, rows)):
        row = hashlib.sha256()
        for chunk in _chunks(file, length // max(1, rows)):
            for state in (whole, tensor, row) if rows else (whole, tensor):
                state.update(chunk)
        found.append(row.hexdigest())
    return tensor.hexdigest(), tuple(found) if rows else ()


def _chunks(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0:
        chunk = file.read(min(length, _CHUNK))
        if not chunk:
            raise Invalid(f"{file.name} was cut while it was read; copy it again", reason=reasons_pb2.REASON_BAD_HEADER)
        length -= len(chunk)
        yield chunk
