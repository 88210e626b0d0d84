"""A base model as byte ranges: which bytes of which file hold a tensor, and which hold one expert.

One expert's rows of a fused `[experts, …]` tensor are contiguous, so a miner fetches its experts with ranged reads and
checks each against a digest, while the files stay an ordinary Hugging Face checkpoint. No torch here: what a model takes from
the checkpoint is said by `connito.base.description`, which also builds manifests.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from connito.data.checkpoint_files import Header
from connito.data.documents import parse_json
from connito.data.tensors import STORED_BITS
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.files import plain_name
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef

_FUSED = re.compile(
    r"^(?P<experts>.*\blayers\.(?P<layer>\d+)\..*experts)\.(?P<part>(?:gate_up_proj|up_proj|down_proj)(?:_bias|_blocks|_scales|_scale_inv)?)$"
)
_SINGLE = re.compile(
    r"^(?P<experts>.*\blayers\.(?P<layer>\d+)\..*experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight(?P<scale>_scale_inv)?$"
)
_PARTS_OF = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_MAX_BYTES, _MAX_FILES, _MAX_TENSORS, _MAX_NAME = 1 << 28, 10_000, 2_000_000, 512

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
class Bank:
    """The routed experts that a stored tensor holds: one, or (`expert` is None) all of a layer, a row each."""

    layer: int
    part: str
    expert: int | None = None


@dataclass(frozen=True)
class Taken:
    """The part of a checkpoint that its model takes: the dtype each stored tensor is loaded in, and those with experts.

    `dtype`: the type of the whole where config.json does not state it; `quantised`: how it is packed, for people.
    """

    dtypes: dict[str, str]
    banks: dict[str, Bank]
    dtype: str = ""
    quantised: str = ""


@dataclass(frozen=True)
class Manifest:
    """Files, tensors and digests of a base model.

    `extra` says what names alone do not: `banks`, tensors whose experts follow another rule than the usual names; `dtypes`,
    in what type tensors are loaded that are stored in another; `dtype`, the model's where its configuration has none;
    `quantised`, how its publisher packed it.

    `name` is for people. `named`: it stands in the manifest, and so in its digest, as in those written until content alone
    became a base's identity.
    """

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    name: str = ""
    extra: dict[str, str] = field(default_factory=dict)
    named: bool = False

    def to_bytes(self) -> bytes:
        """Return the manifest as reproducible JSON."""
        data = {
            "version": 1,
            "name": self.name if self.named else "",
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
        """Return the inverse of `to_bytes`. Raises `Invalid` for anything else, whoever wrote it."""
        try:
            if len(data) > _MAX_BYTES:
                raise ValueError(f"it has {len(data)} bytes, more than {_MAX_BYTES}")
            parsed = parse_json(data)
            _require(isinstance(parsed, dict) and type(parsed.get("version")) is int, "it has no version")
            if parsed["version"] != 1:
                raise Invalid(f"manifest version {parsed['version']} is newer than this program; update connito")
            files = {entry.name: entry for entry in _entries(parsed["files"], _file_entry, _MAX_FILES)}
            tensors = {entry.name: entry for entry in _entries(parsed["tensors"], _tensor_entry, _MAX_TENSORS)}
            _require(len(files) == len(parsed["files"]), "a file is listed twice")
            _require(len(tensors) == len(parsed["tensors"]), "a tensor is listed twice")
            for tensor in tensors.values():
                inside = tensor.file in files and tensor.start + tensor.length <= files[tensor.file].size
                _require(inside, f"{tensor.name} lies in no file")
            name = _text(parsed["name"], 1024)
            manifest = cls(files, tensors, name, _texts(parsed["extra"]), named=bool(name))
            manifest._check_extra()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise Invalid(f"this is not a base manifest: {error or type(error).__name__}") from error
        return manifest

    @property
    def digest(self) -> str:
        """Return hex SHA-256 of the manifest: the base's identity."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def is_known_as(self, name: str, digest: str) -> bool:
        """Return whether somebody who wrote down a base's name and the digest of its manifest meant this base."""
        return digest in (self.digest, replace(self, named=False).digest, replace(self, name=name, named=True).digest)

    @property
    def quantised(self) -> str:
        """Return how the base is packed, for people; empty for plain numbers."""
        return self.extra.get("quantised", "")

    @property
    def size(self) -> int:
        """Return bytes of all tensors."""
        return sum(tensor.length for tensor in self.tensors.values())

    @cached_property
    def banks(self) -> dict[str, Bank]:
        """Return the tensors that hold routed experts, by name."""
        own = {
            name: Bank(*entry) if entry else None for name, entry in parse_json(self.extra.get("banks", "{}")).items()
        }
        found = {name: own[name] if name in own else usual_bank(name) for name in self.tensors}
        return {name: bank for name, bank in found.items() if bank is not None}

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        found: dict[str, str] = parse_json(self.extra.get("dtypes", "{}"))
        return found

    def dtype(self, name: str) -> str:
        """Return the type in which a tensor is loaded, which may be another than it is stored in."""
        return self._dtypes.get(name, self._dtypes.get("", self.tensors[name].dtype))

    def values(self, name: str) -> int:
        """Return how many numbers the tensor is loaded as: none for scales of a quantised base, two for a byte of MXFP4."""
        if self.quantised and name.endswith(("_scale_inv", "_scales")):
            return 0
        each = 2 if self.quantised and name.endswith("_blocks") else 1
        return each * math.prod(self.tensors[name].shape)

    def loaded_bytes(self, name: str) -> int:
        """Return the tensor's size in memory, in the type it is loaded in."""
        return self.values(name) * STORED_BITS[self.dtype(name)] // 8

    def experts(self) -> dict[int, int]:
        """Return the number of experts by layer."""
        out: dict[int, int] = {}
        for name, bank in self.banks.items():
            count = self.tensors[name].shape[0] if bank.expert is None else bank.expert + 1
            out[bank.layer] = max(out.get(bank.layer, 0), count)
        return dict(sorted(out.items()))

    def expert_bytes(self) -> dict[int, int]:
        """Return the size of one expert by layer, in the type it is loaded in."""
        out = dict.fromkeys(self.experts(), 0)
        for name, bank in self.banks.items():
            if bank.expert in (None, 0):
                rows = max(1, self.tensors[name].shape[0]) if bank.expert is None else 1
                out[bank.layer] += self.loaded_bytes(name) // rows
        return out

    def expert_value_bytes(self) -> int:
        """Return bytes of one value of an expert as it is loaded: 4 for F32, 2 for BF16."""
        return min((STORED_BITS[self.dtype(name)] // 8 for name in self.banks), default=4)

    def expert_rows(self, layer: int, expert: int) -> list[Range]:
        """Return the byte ranges of one expert. Raises `NotFound` when the base has no such expert."""
        found = []
        for name, bank in self.banks.items():
            tensor = self.tensors[name]
            if bank.layer != layer:
                continue
            if bank.expert is None and 0 <= expert < tensor.shape[0]:
                found.append(_row(tensor, bank.part, expert))
            elif bank.expert == expert:
                found.append(
                    Range(
                        bank.part, tensor.file, tensor.start, tensor.length, tensor.sha256, tensor.dtype, tensor.shape
                    )
                )
        if not found:
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
        bank = self.banks.get(name)
        return bank.layer if bank else None

    def headers(self) -> dict[str, Header]:
        """Return every tensor as `read_headers` returns those of a folder."""
        return {t.name: Header(t.file, t.dtype, t.shape, t.start, t.length) for t in self.tensors.values()}

    def read(self, reader: Reader, name: str) -> bytes:
        """Return one whole tensor's bytes, checked."""
        tensor = self.tensors[name]
        return checked(reader(self.files[tensor.file], tensor.start, tensor.length), tensor.sha256, name)

    def read_range(self, reader: Reader, part: Range) -> bytes:
        """Return one expert range's bytes, checked."""
        return checked(reader(self.files[part.file], part.start, part.length), part.sha256, f"{part.file}@{part.start}")

    def _check_extra(self) -> None:
        for name, dtype in self._dtypes.items():
            _require((not name or name in self.tensors) and dtype in STORED_BITS, f"the type of {name!r} is unknown")
        for name, bank in self.banks.items():
            sound = type(bank.layer) is int and 0 <= bank.layer < 1 << 20 and isinstance(bank.part, str)
            index = bank.expert is None or (type(bank.expert) is int and 0 <= bank.expert < 1 << 20)
            rows = bank.expert is not None or self.tensors[name].shape[:1] not in ((), (0,))
            _require(sound and index and rows, f"the experts of {name} are not described")


def checked(data: bytes, sha256: str, what: str) -> bytes:
    """Return `data` if its digest is `sha256`, else `VerificationFailed`."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise VerificationFailed(
            f"{what} has other bytes than the manifest says: the copy is damaged or was replaced; fetch it again",
            reason=reasons_pb2.REASON_DIGEST_MISMATCH,
        )
    return data


def usual_bank(name: str) -> Bank | None:
    """Return the experts that a tensor of this name usually holds, or None."""
    if match := _FUSED.match(name):
        return Bank(int(match["layer"]), match["part"])
    if match := _SINGLE.match(name):
        return Bank(int(match["layer"]), _PARTS_OF[match["part"]] + (match["scale"] or ""), int(match["expert"]))
    return None


def _row(tensor: TensorEntry, part: str, expert: int) -> Range:
    size = tensor.length // tensor.shape[0]
    return Range(
        part, tensor.file, tensor.start + expert * size, size, tensor.rows[expert], tensor.dtype, tensor.shape[1:]
    )


def _require(sound: bool, why: str) -> None:
    if not sound:
        raise ValueError(why)


_E = TypeVar("_E")


def _entries(raw: Any, entry: Callable[[dict[str, Any]], _E], most: int) -> list[_E]:
    _require(isinstance(raw, list) and len(raw) <= most and all(isinstance(e, dict) for e in raw), "a list is none")
    return [entry(each) for each in raw]


def _file_entry(raw: dict[str, Any]) -> FileEntry:
    found = FileEntry(**raw)
    _require(
        isinstance(found.name, str) and plain_name(found.name), f"{str(found.name)[:80]!r} is not a file's plain name"
    )
    _digest(found.digest)
    _count(found.size)
    _text(found.media_type, 128)
    return found


def _tensor_entry(raw: dict[str, Any]) -> TensorEntry:
    shape, rows = raw["shape"], raw["rows"]
    _require(isinstance(shape, list) and len(shape) <= 8 and isinstance(rows, list), "a shape is none")
    found = TensorEntry(**{**raw, "shape": tuple(map(_count, shape)), "rows": tuple(map(_digest, rows))})
    for text in (found.name, found.file, found.dtype):
        _text(text, _MAX_NAME)
    _digest(found.sha256)
    bits = STORED_BITS.get(found.dtype, 0)
    fits = _count(found.length) == math.prod(found.shape) * bits // 8 and bits > 0 and _count(found.start) >= 0
    _require(fits and (not rows or (len(rows),) == found.shape[:1]), f"{found.name} is not of its type and shape")
    return found


def _count(value: Any) -> int:
    _require(type(value) is int and 0 <= value < 1 << 53, "a number is not a size")
    return int(value)


def _digest(value: Any) -> str:
    _require(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, "a digest is none")
    return str(value)


def _text(value: Any, most: int) -> str:
    _require(isinstance(value, str) and len(value) <= most, "a text is none")
    return str(value)


def _texts(value: Any) -> dict[str, str]:
    _require(isinstance(value, dict) and len(value) <= 64, "extra is no mapping")
    return {_text(k, _MAX_NAME): _text(v, _MAX_BYTES) for k, v in value.items()}
