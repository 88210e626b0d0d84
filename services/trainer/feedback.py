"""Error feedback: what a codec left out of a submission is added to the next one, where that is worth it (`carries`).

    <work_dir>/<run>/left/<cycle>.safetensors     float32 over the target rows

A cycle begins with what the newest earlier cycle left whose submission was merged, or may still be. Work that was not merged is
dropped with what its coding left out: it began from a state that has gone, and validators or time found it of no use. What had
been left before it stays.
"""

from __future__ import annotations

from pathlib import Path

from connito.data.codecs.file import CODED
from connito.data.codecs.scales import codable
from connito.data.pseudo_gradients import load_float32
from connito.data.safetensors_header import SAFETENSORS
from connito.data.tensors import read_header
from connito.errors import ConnitoError, Invalid
from connito.protocol.coding import carries, encode, is_coded
from connito.runtime.logs import get_logger
from connito.v1 import reasons_pb2
from connito.wire.facts import RunFacts

log = get_logger("feedback")


def media_type(facts: RunFacts) -> str:
    """Return what a submission of a run is."""
    return CODED if is_coded(facts.require_spec().training) else SAFETENSORS


def code(facts: RunFacts, me: str, cycle: int, state: Path, draft: Path, folder: Path) -> Path:
    """Return the file to hand in for the rows in `draft`: themselves, or beside them what they are coded to. Blocking.

    `folder` keeps what coding leaves out. Rows that are not those of the run are handed in as they are, for others to refuse.
    """
    policy = facts.require_spec().training
    if not is_coded(policy):
        return draft
    coded, left, leaves = draft.with_suffix(".coded"), None, None
    if carries(policy):
        folder.mkdir(exist_ok=True, mode=0o700)
        left, leaves = _left(facts, me, cycle, folder), folder / f"{cycle}.safetensors"
    try:
        encode(draft, state, policy, left, coded, leaves)
    except Invalid as error:
        log.warning("handing in rows that cannot be coded", because=str(error))
        return draft
    log.info("coded", codec=policy.codec, bytes=coded.stat().st_size, of=draft.stat().st_size, carried=left is not None)
    draft.unlink()
    return coded


def _left(facts: RunFacts, me: str, cycle: int, folder: Path) -> Path | None:
    """Return the file that a cycle begins with, and remove the others: of this cycle from before a crash, too."""
    kept: Path | None = None
    own = [path for path in folder.glob("*.safetensors") if path.stem.isdecimal() and path.is_file()]
    for path in sorted(own, key=lambda path: -int(path.stem)):
        if kept is None and int(path.stem) < cycle and counts(facts, me, int(path.stem)) and _whole(path):
            kept = path
        else:
            path.unlink()
    return kept


def _whole(path: Path) -> bool:
    """Return whether a file is as it was written. What a power cut or a disk made of it must not cost this submission, and
    every later one with it."""
    try:
        entries = read_header(path).entries
        whole = all(entry.dtype == "F32" and codable(load_float32(path, name)) for name, entry in entries.items())
    except ConnitoError:
        whole = False
    if not whole:
        log.warning("what coding left out before is damaged, so it is not added", file=str(path))
    return whole


def counts(facts: RunFacts, me: str, cycle: int) -> bool:
    """Return whether the work of a cycle was merged, there or a cycle late, or may still be."""
    for judged in (cycle, cycle + 1):
        reveal = facts.reveal(judged, me)
        if reveal is not None and reveal.submission.origin_cycle == cycle:
            version = facts.version(judged)
            return version is None or me in version.merged
    settled = facts.window("commit", cycle).settled
    passed = facts.window("submit", cycle + 1).closed is not None
    return not passed and settled is not None and me in settled.committed and not _refused(facts, me, cycle)


def _refused(facts: RunFacts, me: str, cycle: int) -> bool:
    waiting = (reasons_pb2.REASON_NOT_REVEALED, reasons_pb2.REASON_LATE_REVEAL)
    refusals = (fact.message for fact in facts.window("submit", cycle).refused.values())
    return any(refusal.miner == me and refusal.reason not in waiting for refusal in refusals)
