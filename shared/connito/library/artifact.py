"""The expert file: the rows a run trained, as ordinary safetensors, with what they are for in the header.

The tensors are those of the model version they come from, byte for byte and in the same order; only the header's
`__metadata__` differs. Copying the data section instead of parsing it keeps the library free of numeric packages and
of dtypes it would have to know, and its memory at one block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connito.data.documents import parse_json
from connito.data.safetensors_header import bad_header, header_bytes, read_header_text
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

FORMAT = "connito-expert/1"
MODEL_FORMAT = "connito-model/1"
MEDIA_TYPE = "application/vnd.connito.expert+safetensors"
EXPERT_FILE = "expert.safetensors"
MODEL_FILE = "model.safetensors"
RECORD_FILE = "record.json"
CARD_FILE = "README.md"

_MAX_HEADER_BYTES = 16 << 20
_BLOCK = 1 << 20


@dataclass(frozen=True)
class ExpertHeader:
    """The header of an expert file. `layers[l]` are the expert ids of the rows of layer l, ascending."""

    domain: str
    base_name: str
    base_digest: str
    layers: dict[int, list[int]]
    run: str
    version: int
    # Digest of the base model's own tensors outside these rows, and of the rows that these replace ("" if unknown).
    base_fingerprint: str = ""
    base_rows: str = ""

    def metadata(self) -> dict[str, str]:
        """Return the header's `__metadata__`: strings only, as the format demands."""
        return {
            "format": FORMAT,
            "domain": self.domain,
            "base_name": self.base_name,
            "base_digest": self.base_digest,
            "base_fingerprint": self.base_fingerprint,
            "base_rows": self.base_rows,
            "layers": json.dumps({str(layer): self.layers[layer] for layer in sorted(self.layers)}),
            "run": self.run,
            "version": str(self.version),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> ExpertHeader:
        """Read `metadata()` back. Raises `Invalid` when the file is not an expert of a version this side knows."""
        if metadata.get("format") != FORMAT:
            raise Invalid(
                f"{path} is not a library expert (format {metadata.get('format', 'missing')!r}, expected {FORMAT!r}); "
                "take one with `connito library export`",
                reason=reasons.REASON_BAD_HEADER,
            )
        try:
            layers = {int(layer): [int(e) for e in ids] for layer, ids in parse_json(metadata["layers"]).items()}
            version = int(metadata["version"])
            return cls(
                metadata["domain"],
                metadata["base_name"],
                metadata["base_digest"],
                layers,
                metadata["run"],
                version,
                metadata.get("base_fingerprint", ""),
                metadata.get("base_rows", ""),
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise Invalid(
                f"the header of {path} is damaged: {error!r}; export the expert again", reason=reasons.REASON_BAD_HEADER
            ) from error


def require_new(folder: Path) -> None:
    """Raise `Invalid` for a folder that holds something already: what is put there would mix with it, or replace it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Invalid(f"{folder} is {'not empty' if folder.is_dir() else 'a file'}: choose another folder")


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a safetensors file and the offset of its data. Raises `Invalid` if it is not one."""
    with path.open("rb") as file:
        text = read_header_text(file, _MAX_HEADER_BYTES, path)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise bad_header(str(error), path) from error
    if not isinstance(header, dict):
        raise bad_header("its header is not an object", path)
    return header, 8 + len(text)


def read_header(path: Path) -> ExpertHeader:
    """Read the header of the expert file at `path`. Raises `Invalid` if it is not one."""
    metadata = read_safetensors_header(path)[0].get("__metadata__")
    return ExpertHeader.from_metadata(metadata if isinstance(metadata, dict) else {}, path)


def write_expert(state: Path, out: Path, header: ExpertHeader) -> str:
    """Write the expert file `out` from a model version's state file. Returns its SHA-256, which is deterministic."""
    tensors, start = read_safetensors_header(state)
    tensors["__metadata__"] = header.metadata()
    digest = hashlib.sha256()
    with state.open("rb") as source, out.open("wb") as target:
        source.seek(start)
        block = header_bytes(tensors, alignment=8)
        while block:
            digest.update(block)
            target.write(block)
            block = source.read(_BLOCK)
    return digest.hexdigest()


def tensor_sizes(state: Path) -> tuple[int, int]:
    """Return the number of parameters and of bytes in a safetensors file's tensors."""
    parameters = size = 0
    for name, entry in read_safetensors_header(state)[0].items():
        if name != "__metadata__":
            count = 1
            for side in entry["shape"]:
                count *= side
            parameters += count
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return parameters, size
