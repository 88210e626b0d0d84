"""The expert file: the rows a run trained, as ordinary safetensors, with what they are for in the header.

The tensors are those of the model version they come from, byte for byte and in the same order; only the header's
`__metadata__` differs. Copying the data section instead of parsing it keeps the library free of numeric packages and
of dtypes it would have to know, and its memory at one block.

safetensors: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """What an expert file says about itself. `layers[l]` are the expert ids of the rows of layer l, ascending."""

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
        """The header's `__metadata__`: strings only, as the format demands."""
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
            layers = {int(layer): [int(e) for e in ids] for layer, ids in json.loads(metadata["layers"]).items()}
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


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset of its data. Raises `Invalid` if it is not one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, max(path.stat().st_size - 8, 0)):
            raise Invalid(f"{path} is not a safetensors file", reason=reasons.REASON_BAD_HEADER)
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise Invalid(
                f"{path} has a damaged safetensors header: {error}", reason=reasons.REASON_BAD_HEADER
            ) from error
    if not isinstance(header, dict):
        raise Invalid(f"{path} has a safetensors header that is not an object", reason=reasons.REASON_BAD_HEADER)
    return header, 8 + length


def read_header(path: Path) -> ExpertHeader:
    """What the expert file at `path` says about itself. Raises `Invalid` if it is not one."""
    metadata = read_safetensors_header(path)[0].get("__metadata__", {})
    return ExpertHeader.from_metadata(metadata, path)


def write_expert(state: Path, out: Path, header: ExpertHeader) -> str:
    """Write the expert file `out` from a model version's state file. Returns its SHA-256, which is deterministic."""
    tensors, start = read_safetensors_header(state)
    tensors["__metadata__"] = header.metadata()
    text = json.dumps(tensors, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data section stays aligned to 8 bytes, as writers of the format keep it
    digest = hashlib.sha256()
    with state.open("rb") as source, out.open("wb") as target:
        source.seek(start)
        block = len(text).to_bytes(8, "little") + text
        while block:
            digest.update(block)
            target.write(block)
            block = source.read(_BLOCK)
    return digest.hexdigest()


def tensor_sizes(state: Path) -> tuple[int, int]:
    """Number of parameters and of bytes in a safetensors file's tensors."""
    parameters = size = 0
    for name, entry in read_safetensors_header(state)[0].items():
        if name != "__metadata__":
            count = 1
            for side in entry["shape"]:
                count *= side
            parameters += count
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return parameters, size
