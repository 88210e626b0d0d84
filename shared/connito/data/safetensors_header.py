"""Frame the header of safetensors files: 8 bytes of little-endian length, JSON, then the tensors' bytes.

What a header may hold differs: `connito.data.tensors` takes files from strangers, others know who wrote theirs. No numeric
package is needed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

SAFETENSORS = "application/vnd.safetensors"
# Data starts at a multiple of this, so that a memory-mapped tensor is aligned for every kernel.
ALIGNMENT = 64


def bad_header(detail: str, what: object = "this") -> Invalid:
    """Return the error for a file that is not exactly of the format."""
    return Invalid(f"{what} is not a well-formed safetensors file: {detail}", reason=reasons.REASON_BAD_HEADER)


def read_header_text(file: BinaryIO, limit: int, what: object = "this") -> bytes:
    """Return the JSON text of a file's header, leaving `file` where the data starts. Raises `Invalid` (BAD_HEADER)."""
    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(limit, size - 8):
        raise bad_header(f"it claims a header of {length} bytes; the file has {size} and the limit is {limit}", what)
    return file.read(length)


def header_bytes(header: Mapping[str, Any], alignment: int = ALIGNMENT) -> bytes:
    """Return `header` with its length in front, keys sorted, filled up so that the data is aligned."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
