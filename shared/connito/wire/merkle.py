"""A Merkle tree hash that grows leaf by leaf (RFC 6962, section 2.1), in the memory of its path to the right edge."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import reduce


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of one leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass
class Tree:
    """The roots of the full subtrees that `size` leaves make, the largest first: one for each bit that is set in it."""

    size: int = 0
    subtrees: list[bytes] = field(default_factory=list)

    def append(self, leaf: bytes) -> None:
        """Add the hash of the next leaf."""
        self.subtrees.append(leaf)
        self.size += 1
        size = self.size
        while size % 2 == 0:
            right, left = self.subtrees.pop(), self.subtrees.pop()
            self.subtrees.append(_node(left, right))
            size //= 2

    def copy(self) -> Tree:
        """Return a tree that grows apart from this one."""
        return Tree(self.size, list(self.subtrees))

    @property
    def root(self) -> bytes:
        """Return the hash over all leaves so far."""
        if not self.subtrees:
            return hashlib.sha256(b"").digest()
        return reduce(lambda right, left: _node(left, right), reversed(self.subtrees))
