"""Verify stored messages: the type of each kind of fact, the role that may sign it, and its subject."""

from __future__ import annotations

import hashlib

from google.protobuf.message import Message

from connito.errors import Invalid
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2, services_pb2
from connito.wire.bounds import check_bounds
from connito.wire.envelope import MAX_ENVELOPE_BYTES, MAX_WHOLE_BYTES, Opened, check, open_bytes
from connito.wire.fact import Fact, Record
from connito.wire.identity import short_key
from connito.wire.roster import OPERATOR, Roster
from connito.wire.subjects import WINDOWS, FactKey, is_ingress, parse_fact, parse_ingress

# Whoever decides and acts on runs as they go on.
ANY = "worker"
# Roles of which each key speaks for itself alone.
OWN = ("validator", ANY)
WORKERS = ("coordinator", "committer", "aggregator", "validator", "library")

ENROL_SUBJECT = "rpc.EnrolMiner"

# (section, kind) -> payload type, role that may sign it, field that must equal the subject's id ("" for no id).
CATALOGUE: dict[tuple[str, str], tuple[type[Message], str, str]] = {
    ("run", "created"): (run_pb2.RunCreated, "coordinator", ""),
    ("run", "miner"): (run_pb2.MinerEnrolled, "coordinator", "miner"),
    ("run", "validator"): (run_pb2.ValidatorJoined, "validator", "validator"),
    ("run", "stake"): (run_pb2.StakeCounted, "coordinator", "validator"),
    ("run", "invited"): (run_pb2.InviteUsed, "coordinator", "invite+number"),
    ("run", "ban"): (run_pb2.MinerBan, "coordinator", "miner+number"),
    ("run", "selected"): (run_pb2.SelectionMade, "selector", ""),
    ("run", "selection_failed"): (run_pb2.SelectionFailed, "selector", ""),
    ("run", "ended"): (run_pb2.RunEnded, "coordinator", ""),
    ("run", "paused"): (run_pb2.RunPaused, ANY, "key"),
    ("run", "head"): (run_pb2.LogHead, "coordinator", ""),
    ("run", "cosigned"): (run_pb2.HeadCosigned, "validator", "validator"),
    ("run", "received"): (run_pb2.IngressHead, "committer", ""),
    ("train", "seed"): (cycle_pb2.SeedCommitted, "validator", "validator"),
    ("commit", "accepted"): (cycle_pb2.CommitmentAccepted, "committer", "miner"),
    ("commit", "refused"): (cycle_pb2.Refused, "committer", "miner+ingress_sequence"),
    ("commit", "settled"): (cycle_pb2.WindowSettled, "committer", ""),
    ("submit", "accepted"): (cycle_pb2.RevealAccepted, "committer", "submission.miner"),
    ("submit", "refused"): (cycle_pb2.Refused, "committer", "miner+ingress_sequence"),
    ("submit", "settled"): (cycle_pb2.WindowSettled, "committer", ""),
    ("validate", "seed"): (cycle_pb2.SeedRevealed, "validator", "validator"),
    ("validate", "drawn"): (cycle_pb2.SeedDrawn, "coordinator", ""),
    ("validate", "objection"): (cycle_pb2.Objection, "validator", "validator"),
    ("validate", "report"): (cycle_pb2.ScoreReport, "validator", "validator"),
    ("merge", "scored"): (cycle_pb2.CycleScored, "aggregator", ""),
    ("merge", "version"): (cycle_pb2.VersionPublished, "aggregator", ""),
    ("library", "benchmarked"): (run_pb2.BenchmarksMeasured, "aggregator", ""),
    ("library", "deposited"): (run_pb2.ExpertDeposited, "library", "expert_id"),
    ("library", "notice"): (run_pb2.ExpertNotice, "library", "id"),
    ("library", "used"): (run_pb2.ExpertUsed, "library", "id"),
    ("library", "archived"): (run_pb2.RunArchived, OPERATOR, ""),
    **{(window, "opened"): (cycle_pb2.WindowOpened, "coordinator", "") for window in WINDOWS},
    **{(window, "closed"): (cycle_pb2.WindowClosed, "coordinator", "") for window in WINDOWS},
}

# Kinds of facts that may outgrow one message (`connito.wire.parts`): what is asked for, and what is said of many.
LARGE = {
    *(("run", "created"), ("run", "selected"), ("commit", "settled"), ("submit", "settled"), ("validate", "drawn")),
    *(("validate", "report"), ("merge", "scored"), ("merge", "version")),
    *((window, kind) for window in WINDOWS for kind in ("opened", "closed")),
}

# ingress kind -> payload type; the signer must be the miner of the subject.
INGRESS: dict[str, type[Message]] = {
    "trained": cycle_pb2.TrainingFinished,
    "commitment": cycle_pb2.Commitment,
    "reveal": cycle_pb2.Reveal,
}


def by_participant(subject: str) -> bool:
    """Return whether a participant may say what stands there, and not a service of the platform alone."""
    try:
        return is_ingress(subject) or role_of(parse_fact(subject)[1]) in OWN
    except Invalid:
        return True


def _subject_id(message: Message, path: str) -> str:
    if "+" in path:
        return "-".join(str(getattr(message, name)) for name in path.split("+"))
    value: object = message
    for name in path.split("."):
        value = getattr(value, name)
    return str(value)


def role_of(key: FactKey) -> str:
    """Return the role that may write a kind of fact. Raises `Invalid` (UNKNOWN_TYPE) for what is none."""
    entry = CATALOGUE.get((key.section, key.kind))
    if entry is None:
        raise Invalid(f"no fact is called {key.section}.{key.kind}", reason=reasons_pb2.REASON_UNKNOWN_TYPE)
    return entry[1]


def open_fact(record: Record, key: FactKey, roster: Roster, limit: int = MAX_ENVELOPE_BYTES) -> Opened:
    """Check the signature of a fact, or of a part of one, and its signer's role. Raises `Invalid` with the reason."""
    role = role_of(key)
    opened = open_bytes(record.data, record.subject, limit)
    entitled = WORKERS if role == ANY else (role,)
    if not any(roster.permitted(one, opened.signer, record.time_unix_ms) for one in entitled):
        raise Invalid(
            f"{short_key(opened.signer)} is not a {role} in the roster, and only a {role} may write {key.section}.{key.kind}",
            reason=reasons_pb2.REASON_NOT_PERMITTED,
        )
    if role in OWN and key.id != opened.signer:
        raise Invalid(f"a {role} may sign only for itself", reason=reasons_pb2.REASON_NOT_PERMITTED)
    return opened


def verify_fact(record: Record, roster: Roster) -> Fact:
    """Check a stored fact, put together if it came in parts: signature, role, type, and that payload and subject agree.

    Raises `Invalid` with the reason.
    """
    run, key = parse_fact(record.subject)
    opened = open_fact(record, key, roster, MAX_WHOLE_BYTES)
    message_type, role, id_path = CATALOGUE[key.section, key.kind]
    message: Message = opened.read(message_type)
    if role in OWN:
        check_bounds(message)
    if isinstance(message, run_pb2.RunPaused) and not roster.permitted(
        message.service, opened.signer, record.time_unix_ms
    ):
        raise Invalid(
            f"{short_key(opened.signer)} speaks for another service than its own",
            reason=reasons_pb2.REASON_NOT_PERMITTED,
        )
    if isinstance(message, run_pb2.MinerEnrolled):
        enrol_command(message)
    claimed_run = message.spec.run if isinstance(message, run_pb2.RunCreated) else getattr(message, "run", "")
    if claimed_run != run or getattr(message, "cycle", key.cycle) != key.cycle:
        raise Invalid(f"the payload names another run or cycle than its subject {record.subject}")
    if id_path and _subject_id(message, id_path) != key.id:
        raise Invalid(f"the payload names another id than its subject {record.subject}")
    digest = hashlib.sha256(record.data).digest()
    return Fact(run, key, message, opened.signer, record.stream, record.sequence, record.time_unix_ms, digest)


def enrol_command(enrolled: run_pb2.MinerEnrolled) -> services_pb2.EnrolMinerCommand:
    """Return what a miner asked with. Raises `Invalid` unless it is for this run, and the miner's own."""
    opened = check(enrolled.order, ENROL_SUBJECT)
    asked = opened.read(services_pb2.EnrolMinerCommand)
    if (opened.signer, asked.run, asked.label) != (enrolled.miner, enrolled.run, enrolled.label):
        raise Invalid(
            f"{short_key(enrolled.miner)} did not ask to take part like this", reason=reasons_pb2.REASON_NOT_PERMITTED
        )
    return asked


def verify_ingress(record: Record) -> Fact:
    """Check what a miner said: signature, and that the signer is the miner of the subject. Raises `Invalid`."""
    run, miner, kind = parse_ingress(record.subject)
    if kind not in INGRESS:
        raise Invalid(
            f"miners say {', '.join(INGRESS)}; {kind!r} is none of them", reason=reasons_pb2.REASON_UNKNOWN_TYPE
        )
    opened = open_bytes(record.data, record.subject)
    if opened.signer != miner:
        raise Invalid("signed by another key than the one in the subject", reason=reasons_pb2.REASON_NOT_PERMITTED)
    message: Message = opened.read(INGRESS[kind])
    check_bounds(message)
    if getattr(message, "run", "") != run:
        raise Invalid(f"the payload names another run than its subject {record.subject}")
    key = FactKey("ingress", int(getattr(message, "cycle", 0)), kind, miner)
    digest = hashlib.sha256(record.data).digest()
    return Fact(run, key, message, opened.signer, record.stream, record.sequence, record.time_unix_ms, digest)
