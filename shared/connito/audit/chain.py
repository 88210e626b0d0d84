"""Hashes over the stored log, so that two auditors can tell whether they read the same one, and where not.

Most of what a message says can be recomputed, and a change in it is found by that. Some cannot: how many tokens a miner
says it trained on, or seconds a validator took. Whoever holds a role's key could rewrite those and sign again; the
chain of another reader shows it, and so do the validators, who vouch in the log itself for what they have read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from connito.audit.differences import Difference, Step
from connito.audit.evidence import Evidence
from connito.v1 import cycle_pb2
from connito.wire.chain import Chains
from connito.wire.fact import Record
from connito.wire.identity import short_key
from connito.wire.subjects import WINDOWS

# What the library hears of an expert once its run has ended: new ones do not make another run of it.
_AFTERWARDS = re.compile(r"connito\.v1\.[^.]+\.library\.0\.(notice\.|used\.|archived$)")


def windows_of(records: Iterable[Record]) -> dict[str, str]:
    """Hash by window (`run`, `train.1`, `commit.1`, …, `library`, `ingress`), hex, in the order of the cycle."""
    chains = Chains()
    for record in sorted(records, key=lambda record: (record.stream, record.sequence)):
        if not _AFTERWARDS.match(record.subject):
            chains.extend(record.subject, record.sequence, record.data)
    return {window: chains.heads[window][1].hex() for window in sorted(chains.heads, key=_order)}


def anchors(evidence: Evidence) -> Step:
    """Check that the log still has the digests that validators signed during the run, so that nothing was rewritten.

    Each commits with its secret to the hashes of the windows before. Whoever holds the services' keys could sign a
    changed past again, but not the validators' word for what it was. A window is found to differ when most of those
    who vouched for it find it so; one alone may be lying.
    """
    places = _places(evidence.records)
    found: list[Difference] = []
    compared, alone = 0, []
    for cycle in evidence.facts.cycles():
        votes: dict[str, dict[str, str]] = {}
        for validator, fact in evidence.facts.seed_commitments(cycle).items():
            for anchor in fact.message.anchors:
                here = places.get((anchor.window, anchor.last_sequence))
                votes.setdefault(anchor.window, {})[validator] = "" if here == anchor.head else _what(anchor, here)
        for window in sorted(votes, key=_order):
            wrong = {validator: what for validator, what in votes[window].items() if what}
            compared += len(votes[window])
            if 2 * len(wrong) > len(votes[window]):
                validator, what = next(iter(wrong.items()))
                others = f"; so do {len(wrong) - 1} others" if len(wrong) > 1 else ""
                found.append(Difference("anchors", window, f"{short_key(validator)} vouched for {what}{others}", cycle))
            else:
                alone += [f"{short_key(validator)} vouches for another {window}" for validator in wrong]
    note = "; ".join(dict.fromkeys(alone)) or ("" if compared else "no validator vouched for an earlier window")
    return Step("anchors", 0, compared, tuple(found), note)


def _places(records: Iterable[Record]) -> dict[tuple[str, int], bytes]:
    """Return the hash of every window up to each of its messages."""
    chains, places = Chains(), {}
    for record in sorted(records, key=lambda record: (record.stream, record.sequence)):
        window = chains.extend(record.subject, record.sequence, record.data)
        places[window, record.sequence] = chains.heads[window][1]
    return places


def _what(anchor: cycle_pb2.WindowAnchor, here: bytes | None) -> str:
    found = "no such message" if here is None else f"{here.hex()[:12]}…"
    return f"{anchor.head.hex()[:12]}… up to message {anchor.last_sequence}, the log holds {found}"


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
