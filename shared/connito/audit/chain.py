"""Hashes over the stored log, so that two auditors can tell whether they read the same one, and where not.

Most of what a message says can be recomputed, and a change in it is found by that. Some cannot: how many tokens a miner
says it trained on, or seconds a validator took. Whoever holds a role's key could rewrite those and sign again; the
chain of another reader shows it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from connito.wire.fact import Record
from connito.wire.subjects import WINDOWS

TAG = b"connito.v1.audit.chain"

# What the library hears of an expert once its run has ended: new ones do not make another run of it.
_AFTERWARDS = re.compile(r"connito\.v1\.[^.]+\.library\.0\.(notice\.|used\.|archived$)")


def windows_of(records: Iterable[Record]) -> dict[str, str]:
    """Hash by window (`run`, `train.1`, `commit.1`, …, `library`, `ingress`), hex, in the order of the cycle.

    h_0 = SHA-256(tag ‖ window), h_n = SHA-256(h_{n−1} ‖ sequence as 8 bytes ‖ length and bytes of subject ‖ of data), numbers
    big-endian, lengths in 4 bytes, over the window's messages by their sequence. A window's messages lie in one stream.
    """
    heads = dict[str, tuple[int, bytes]]()
    for record in sorted(records, key=lambda record: (record.stream, record.sequence)):
        if _AFTERWARDS.match(record.subject):
            continue
        window = _window_of(record.subject)
        last, head = heads.get(window, (0, hashlib.sha256(TAG + window.encode()).digest()))
        # One that was read before changes nothing.
        if record.sequence > last:
            link = b"".join(len(part).to_bytes(4, "big") + part for part in (record.subject.encode(), record.data))
            heads[window] = record.sequence, hashlib.sha256(head + record.sequence.to_bytes(8, "big") + link).digest()
    return {window: heads[window][1].hex() for window in sorted(heads, key=_order)}


def head(windows: Mapping[str, str]) -> str:
    """Return one hash over all windows."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in windows.items()).encode()).hexdigest()


def first_break(mine: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return the first window in which two chains differ; empty when they do not."""
    for window in sorted({*mine, *other}, key=_order):
        if mine.get(window) != other.get(window):
            return window
    return ""


def _order(window: str) -> tuple[int, int, str]:
    section, _, cycle = window.partition(".")
    if section in WINDOWS:
        return (
            1,
            int(cycle) * len(WINDOWS) + WINDOWS.index(section) if re.fullmatch("[0-9]{1,10}", cycle) else 0,
            window,
        )
    return ({"run": 0, "library": 2, "ingress": 3}.get(section, 4), 0, window)


def _window_of(subject: str) -> str:
    """Return the window that a message belongs to: `commit.2`, or `run`, `library`, `ingress`."""
    parts = subject.split(".")
    section = parts[3] if len(parts) > 3 else ""
    return f"{section}.{parts[4]}" if section in WINDOWS and len(parts) > 4 else section
