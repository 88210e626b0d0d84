"""Checkpoints of a log and cosignatures under them, as other transparency logs write them.

C2SP signed-note, tlog-checkpoint and tlog-cosignature (cosignature/v1): text that any of their tools reads.

    connito.v1/demo/5f0c…            origin: which log
    128                              leaves
    kTb2…=                           root hash, base64

    — connito.v1/demo/5f0c… mJ3…=    a signature: key name, base64 of 4 bytes of key id and what was signed

The keys are the nkeys of the roster. A signature is over the text itself, without the tag that envelopes begin with; and a login
challenge of the broker that holds a newline is never answered. So neither of the two can be made into a checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from connito.errors import Invalid
from connito.wire.identity import Identity, raw_key, verify_text

_LOG, _COSIGNER = b"\x01", b"\x04"
_LINE = re.compile(r"— (\S+) ([A-Za-z0-9+/]+={0,2})")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """A log's origin, its number of leaves and their root hash. `text` is what signatures are over, `lines` are those."""

    origin: str
    size: int
    root: bytes
    lines: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Return what is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @property
    def note(self) -> str:
        """Return the signed note."""
        return self.text + "\n" + "".join(f"{line}\n" for line in self.lines)

    @classmethod
    def parse(cls, note: str) -> Checkpoint:
        """Read a note. Raises `Invalid` for one that is not a signed checkpoint in this exact form."""
        text, separator, below = note.partition("\n\n")
        lines = text.split("\n")
        try:
            if len(note) > MAX_BYTES or not separator or len(lines) != 3 or not below.endswith("\n") or not lines[0]:
                raise ValueError("it is no note of three lines and signatures")
            if not _NUMBER.fullmatch(lines[1]):
                raise ValueError("its size is no number")
            root = base64.b64decode(lines[2], validate=True)
            signatures = tuple(below[:-1].split("\n"))
            if len(root) != 32 or not all(_LINE.fullmatch(line) for line in signatures):
                raise ValueError("its root or a signature line is malformed")
        except ValueError as error:
            raise Invalid(f"not a checkpoint: {error}") from error
        found = cls(lines[0], int(lines[1]), root, signatures)
        if found.note != note:
            raise Invalid("not a checkpoint: it is written in another form than the one that is signed")
        return found

    def signed(self, identity: Identity) -> Checkpoint:
        """Return the checkpoint with the log's own signature."""
        signature = identity.sign_text(self.text.encode())
        return self._with(_line(self.origin, _key_id(self.origin, _LOG, identity.public) + signature))

    def cosigned(self, identity: Identity, unix_seconds: int) -> Checkpoint:
        """Return the checkpoint with a cosignature under the name of the key: its holder saw no other history by then."""
        return self._with(cosignature(self, identity, unix_seconds))

    def _with(self, line: str) -> Checkpoint:
        return Checkpoint(self.origin, self.size, self.root, (*self.lines, line))

    def is_signed_by(self, public: str) -> bool:
        """Return whether the log's own signature is there, by this key."""
        return any(
            id_ == _key_id(self.origin, _LOG, public) and verify_text(public, self.text.encode(), signature)
            for name, id_, signature in map(_read, self.lines)
            if name == self.origin
        )

    def cosigners(self) -> dict[str, int]:
        """Return whose cosignature holds, by public key, with the time (Unix seconds) that each one names."""
        named = {name for name, _, _ in map(_read, self.lines) if name != self.origin}
        times = {name: max((cosigned_at(self, name, line) for line in self.lines), default=0) for name in named}
        return {name: at for name, at in times.items() if at}


def cosignature(checkpoint: Checkpoint, identity: Identity, unix_seconds: int) -> str:
    """Return the line to put under a checkpoint."""
    signature = identity.sign_text(_cosigned_text(checkpoint, unix_seconds))
    stamped = unix_seconds.to_bytes(8, "big") + signature
    return _line(identity.public, _key_id(identity.public, _COSIGNER, identity.public) + stamped)


def cosigned_at(checkpoint: Checkpoint, public: str, line: str) -> int:
    """Return the time at which a key cosigned; 0 when the line is not its cosignature of this checkpoint."""
    name, id_, stamped = _read(line)
    if name != public or len(stamped) != 72:
        return 0
    try:
        if id_ != _key_id(public, _COSIGNER, public):
            return 0
    except ValueError:
        return 0
    at = int.from_bytes(stamped[:8], "big")
    return at if verify_text(public, _cosigned_text(checkpoint, at), stamped[8:]) else 0


def _cosigned_text(checkpoint: Checkpoint, unix_seconds: int) -> bytes:
    return f"cosignature/v1\ntime {unix_seconds}\n{checkpoint.text}".encode()


def _key_id(name: str, algorithm: bytes, public: str) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + algorithm + raw_key(public)).digest()[:4]


def _line(name: str, data: bytes) -> str:
    return f"— {name} {base64.b64encode(data).decode()}"


def _read(line: str) -> tuple[str, bytes, bytes]:
    """Return name, key id and signature of a line; of one that is none, nothing."""
    found = _LINE.fullmatch(line)
    if found is None:
        return "", b"", b""
    try:
        data = base64.b64decode(found[2], validate=True)
    except ValueError:
        return "", b"", b""
    return found[1], data[:4], data[4:]
