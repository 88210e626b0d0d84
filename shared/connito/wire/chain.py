"""Hash chains over the log, one for each window of a run, that whoever reads it can go on with message by message.

h_0 = SHA-256(tag ‖ window), h_n = SHA-256(h_{n−1} ‖ sequence as 8 bytes ‖ length and bytes of subject ‖ of data), numbers
big-endian, lengths in 4 bytes, over the window's messages by their sequence. A window's messages lie in one stream.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from connito.wire.subjects import WINDOWS

TAG = b"connito.v1.audit.chain"


@dataclass
class Chains:
    """By window (`run`, `train.1`, `commit.1`, …): the last sequence and the hash up to it."""

    heads: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def extend(self, subject: str, sequence: int, data: bytes) -> str:
        """Add one message and return its window; one that was read before changes nothing."""
        window = window_of(subject)
        last, head = self.heads.get(window, (0, hashlib.sha256(TAG + window.encode()).digest()))
        if sequence > last:
            link = b"".join(len(part).to_bytes(4, "big") + part for part in (subject.encode(), data))
            self.heads[window] = sequence, hashlib.sha256(head + sequence.to_bytes(8, "big") + link).digest()
        return window


def window_of(subject: str) -> str:
    """Return the window that a message belongs to: `commit.2`, or `run`, `library`, `ingress`."""
    parts = subject.split(".")
    section = parts[3] if len(parts) > 3 else ""
    return f"{section}.{parts[4]}" if section in WINDOWS and len(parts) > 4 else section
