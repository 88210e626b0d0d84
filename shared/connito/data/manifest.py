"""A base model as byte ranges: which bytes of which file hold a tensor, and which hold one expert.

One expert's rows of a fused `[experts, …]` tensor are contiguous, so a miner fetches its experts with ranged reads and
checks each against a digest, while the files stay an ordinary Hugging Face checkpoint. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from connito.data.safetensors_header import SAFETENSORS, bad_header, read_header_text
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef

MEDIA_TYPES = {".safetensors": SAFETENSORS, ".json": "application/json"}
# Files of a checkpoint directory that belong to the model. Weights in other formats are left out.
PARTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")

_FUSED = re.compile(
    r"^(?P<experts>.*\blayers\.(?P<layer>\d+)\..*experts)\.(?P<part>(?:gate_up_proj|up_proj|down_proj)(?:_bias)?)$"
)
_SINGLE = re.compile(
    r"^(?P<experts>.*\blayers\.(?P<layer>\d+)\..*experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_PARTS_OF = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}

# (file, first byte, length) -> those bytes.
Reader = Callable[["FileEntry", int, int], bytes]


@dataclass(frozen=True)
class FileEntry:
    """A file of the checkpoint, by content. `digest` is hex SHA-256; the store's address is made of it."""

    name: str
    digest: str
    size: int
    media_type: str

    @property
    def ref(self) -> ArtifactRef:
        """Return the file's address in the store."""
        return ArtifactRef(digest=self.digest, size=self.size, media_type=self.media_type, realm=REALM_PUBLIC)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's bytes: `start` is absolute in the file. `rows` has a digest per expert for a fused bank, else nothing."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int
    sha256: str
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Range:
    """Bytes that belong to one expert. `parameter` is the tensor of the experts module, or gate, up, down of one that
    stores its experts singly."""

    parameter: str
    file: str
    start: int
    length: int
    sha256: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Files, tensors and digests of a base model."""

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    name: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the manifest as reproducible JSON."""
        data = {
            "version": 1,
            "name": self.name,
            "extra": self.extra,
            "files": [asdict(self.files[name]) for name in sorted(self.files)],
            "tensors": [asdict(self.tensors[name]) for name in sorted(self.tensors)],
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest's file. Raises `Invalid`."""
        return cls.from_bytes(path.read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the inverse of `to_bytes`. Raises `Invalid` for anything else."""
        try:
            parsed = json.loads(data)
            if parsed["version"] != 1:
                raise Invalid(f"manifest version {parsed['version']} is newer than this program; update connito")
            files = [FileEntry(**entry) for entry in parsed["files"]]
            tensors = [
                TensorEntry(**{**entry, "shape": tuple(entry["shape"]), "rows": tuple(entry["rows"])})
                for entry in parsed["tensors"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise Invalid(f"this is not a base manifest: {error!r}") from error
        return cls({f.name: f for f in files}, {t.name: t for t in tensors}, parsed["name"], parsed["extra"])

    @property
    def digest(self) -> str:
        """Return hex SHA-256 of the manifest: the base's identity."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Return bytes of all tensors."""
        return sum(tensor.length for tensor in self.tensors.values())

    def experts(self) -> dict[int, int]:
        """Return the number of experts by layer."""
        out: dict[int, int] = {}
        for tensor in self.tensors.values():
            if match := _FUSED.match(tensor.name):
                out[int(match["layer"])] = tensor.shape[0]
            elif match := _SINGLE.match(tensor.name):
                layer = int(match["layer"])
                out[layer] = max(out.get(layer, 0), int(match["expert"]) + 1)
        return dict(sorted(out.items()))

    def expert_bytes(self) -> dict[int, int]:
        """Return the size of one expert by layer."""
        return {layer: sum(r.length for r in self.expert_rows(layer, 0)) for layer in self.experts()}

    def expert_value_bytes(self) -> int:
        """Return bytes of one stored value of an expert: 4 for F32, 2 for BF16."""
        found = [tensor for tensor in self.tensors.values() if is_expert_tensor(tensor.name)]
        return min((tensor.length // max(1, math.prod(tensor.shape)) for tensor in found), default=4)

    def expert_rows(self, layer: int, expert: int) -> list[Range]:
        """Return the byte ranges of one expert. Raises `NotFound` when the base has no such expert."""
        found = []
        for tensor in self.tensors.values():
            if (match := _FUSED.match(tensor.name)) and int(match["layer"]) == layer and expert < tensor.shape[0]:
                found.append(_row(tensor, match["part"], expert))
            elif (match := _SINGLE.match(tensor.name)) and (int(match["layer"]), int(match["expert"])) == (
                layer,
                expert,
            ):
                found.append(
                    Range(
                        _PARTS_OF[match["part"]],
                        tensor.file,
                        tensor.start,
                        tensor.length,
                        tensor.sha256,
                        tensor.dtype,
                        tensor.shape,
                    )
                )
        if not found or expert < 0:
            raise NotFound(
                f"the base has no expert {expert} in layer {layer}; it has {self.experts()} (experts by layer)"
            )
        return sorted(found, key=lambda r: r.parameter)

    def row(self, name: str, expert: int) -> Range:
        """Return the byte range of one expert's row of a fused tensor. Raises `NotFound` when it has no such row."""
        tensor = self.tensors[name]
        if not 0 <= expert < len(tensor.rows):
            raise NotFound(
                f"{name} has {len(tensor.rows)} rows with a digest of their own, none for expert {expert}; import the "
                "base again"
            )
        return _row(tensor, name.rpartition(".")[2], expert)

    def is_expert(self, name: str) -> int | None:
        """Return the layer whose routed experts `name` belongs to, or None for a shared tensor."""
        match = _FUSED.match(name) or _SINGLE.match(name)
        return int(match["layer"]) if match else None

    def read(self, reader: Reader, name: str) -> bytes:
        """Return one whole tensor's bytes, checked."""
        tensor = self.tensors[name]
        return checked(reader(self.files[tensor.file], tensor.start, tensor.length), tensor.sha256, name)

    def read_range(self, reader: Reader, part: Range) -> bytes:
        """Return one expert range's bytes, checked."""
        return checked(reader(self.files[part.file], part.start, part.length), part.sha256, f"{part.file}@{part.start}")


def checked(data: bytes, sha256: str, what: str) -> bytes:
    """Return `data` if its digest is `sha256`, else `VerificationFailed`."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise VerificationFailed(
            f"{what} has other bytes than the manifest says: the copy is damaged or was replaced; fetch it again",
            reason=reasons_pb2.REASON_DIGEST_MISMATCH,
        )
    return data


def build_manifest(directory: Path, name: str = "", progress: Callable[[str, float], None] | None = None) -> Manifest:
    """Read a checkpoint directory once and describe it.

    Raises `NotFound` when there are no safetensors, `Invalid` when a header is damaged or the model has no experts.
    """
    paths = sorted({path for pattern in PARTS for path in directory.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in paths):
        raise NotFound(f"{directory} holds no .safetensors file; give a Hugging Face checkpoint in safetensors format")
    total, done = sum(path.stat().st_size for path in paths), 0
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for path in paths:
        digest, found = _read(path)
        media = MEDIA_TYPES.get(path.suffix, "application/octet-stream")
        files[path.name] = FileEntry(path.name, digest, path.stat().st_size, media)
        tensors |= found
        done += path.stat().st_size
        if progress is not None:
            progress("hashing the base", done / total)
    manifest = Manifest(files, tensors, name or directory.name)
    if not manifest.experts():
        raise Invalid(
            f"{directory} has no routed experts: it is a dense model; turn it into one with "
            f"`connito base build --from {directory}`",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )
    return manifest


@dataclass(frozen=True)
class Header:
    """A tensor as its file's header describes it. `length`: bytes; `values`: how many numbers."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    length: int

    @property
    def values(self) -> int:
        """Return the number of values in the tensor."""
        return math.prod(self.shape)


def headers_of(directory: Path) -> dict[str, Header]:
    """Return every tensor by name, from the headers alone. Raises `Invalid` for a damaged header or a file that was
    cut.
    """
    found: dict[str, Header] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            prefix, entries = _header(path, file)
        for name, entry in entries:
            first, end = entry["data_offsets"]
            if len(prefix) + end > path.stat().st_size:
                raise Invalid(f"{path} ends inside {name}; copy it again", reason=reasons_pb2.REASON_BAD_HEADER)
            found[name] = Header(path.name, str(entry["dtype"]), tuple(map(int, entry["shape"])), end - first)
    return found


def is_expert_tensor(name: str) -> bool:
    """Return whether a tensor of this name holds routed experts, fused or singly."""
    return bool(_FUSED.match(name) or _SINGLE.match(name))


def expert_sizes(headers: Mapping[str, Header]) -> dict[int, int]:
    """Return bytes of one expert by layer, from headers: what `Manifest.expert_bytes` says without reading a weight."""
    out: dict[int, int] = {}
    for name, entry in headers.items():
        if match := _FUSED.match(name):
            share = entry.length // max(1, entry.shape[0])
        elif (match := _SINGLE.match(name)) and match["expert"] == "0":
            share = entry.length
        else:
            continue
        out[int(match["layer"])] = out.get(int(match["layer"]), 0) + share
    return dict(sorted(out.items()))


def _read(path: Path) -> tuple[str, dict[str, TensorEntry]]:
    """Return (digest of the file, its tensors), reading it once from front to back."""
    whole = hashlib.sha256()
    tensors: dict[str, TensorEntry] = {}
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header, start = _header(path, file)
            whole.update(header)
            for name, entry in start:
                data = file.read(entry["data_offsets"][1] - entry["data_offsets"][0])
                if len(header) + entry["data_offsets"][1] > path.stat().st_size:
                    raise Invalid(f"{path} ends inside {name}; copy it again", reason=reasons_pb2.REASON_BAD_HEADER)
                whole.update(data)
                tensors[name] = _entry(path.name, name, entry, len(header), data)
        while chunk := file.read(1 << 20):
            whole.update(chunk)
    return whole.hexdigest(), tensors


def _header(path: Path, file: BinaryIO) -> tuple[bytes, list[tuple[str, Mapping[str, Any]]]]:
    """Return header bytes with their length prefix, and the entries in file order, which must leave no gap."""
    text = read_header_text(file, 1 << 30, path)
    try:
        parsed = json.loads(text)
        entries = sorted(
            ((n, e) for n, e in parsed.items() if n != "__metadata__"), key=lambda item: item[1]["data_offsets"]
        )
        edges = [e["data_offsets"] for _, e in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_header(f"its header is damaged ({error!r})", path) from error
    if any(a != b for (_, a), (b, _) in zip([(0, 0), *edges], edges, strict=False)):
        raise bad_header("there are gaps or overlaps between its tensors", path)
    return len(text).to_bytes(8, "little") + text, entries


def _entry(file: str, name: str, entry: Mapping[str, Any], offset: int, data: bytes) -> TensorEntry:
    shape = tuple(int(x) for x in entry["shape"])
    rows: tuple[str, ...] = ()
    if _FUSED.match(name) and shape and len(data) % shape[0] == 0:
        size = len(data) // shape[0]
        view = memoryview(data)
        rows = tuple(hashlib.sha256(view[i * size : (i + 1) * size]).hexdigest() for i in range(shape[0]))
    return TensorEntry(
        name,
        file,
        str(entry["dtype"]),
        shape,
        offset + int(entry["data_offsets"][0]),
        len(data),
        hashlib.sha256(data).hexdigest(),
        rows,
    )


def _row(tensor: TensorEntry, part: str, expert: int) -> Range:
    size = tensor.length // tensor.shape[0]
    assert math.prod(tensor.shape) == 0 or size > 0
    return Range(
        part, tensor.file, tensor.start + expert * size, size, tensor.rows[expert], tensor.dtype, tensor.shape[1:]
    )
