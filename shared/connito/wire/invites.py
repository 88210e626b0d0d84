"""Invites: a signed token that lets a number of keys into one run, or into every run, until it expires.

The token is the signed message in URL-safe base64. It is a bearer's: whoever has it can use it, as often as it says.
"""

from __future__ import annotations

import base64
import binascii

from google.protobuf.message import DecodeError

from connito.errors import Invalid
from connito.v1 import reasons_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.v1.run_pb2 import EnrolmentPolicy, Invite
from connito.wire.envelope import check, seal
from connito.wire.identity import Identity
from connito.wire.roster import OPERATOR, Roster
from connito.wire.subjects import check_token

SUBJECT = "token.Invite"
MAX_USES = 10_000
MAX_TOKEN = 4096


def issue(issuer: Identity, invite: Invite) -> str:
    """Return the token. Raises `Invalid` for an invite that could never be used."""
    check_token(invite.id, "invite id")
    if not 1 <= invite.uses <= MAX_USES:
        raise _wrong(f"an invite is for 1 to {MAX_USES} keys, not {invite.uses}")
    return base64.urlsafe_b64encode(seal(issuer, SUBJECT, invite).SerializeToString()).decode().rstrip("=")


def parse(token: str) -> Envelope:
    """Return the signed message in a token. Raises `Invalid` (INVITE_INVALID) for anything else."""
    text = token.strip()
    if not text or len(text) > MAX_TOKEN:
        raise _wrong("this is not an invite; copy all of the token that you were given")
    try:
        return Envelope.FromString(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, DecodeError) as error:
        raise _wrong("this is not an invite; copy all of the token that you were given") from error


def unverified(envelope: Envelope) -> Invite:
    """Return what an invite says, whoever signed it. Raises `Invalid` (INVITE_INVALID) for what is none."""
    try:
        return Invite.FromString(envelope.payload)
    except DecodeError as error:
        raise _wrong("this is not an invite; copy all of the token that you were given") from error


def verify(envelope: Envelope, run: str, customer: str, roster: Roster, now_ms: int) -> Invite:
    """Return the invite, if it lets keys into `run` at `now_ms` (Unix ms). How often it was used is the log's to say.

    Raises `Invalid` (INVITE_INVALID) saying what is wrong.
    """
    try:
        opened = check(envelope, SUBJECT)
        invite = opened.read(Invite)
        check_token(invite.id, "invite id")
    except Invalid as error:
        raise _wrong(f"the invite does not verify: {error}") from error
    if invite.run not in ("", run):
        raise _wrong(f"the invite is for run {invite.run!r}, not for {run!r}")
    if not roster.permits(OPERATOR, opened.signer) and (invite.run == "" or opened.signer != customer):
        raise _wrong("the invite is signed by neither an operator nor the run's customer")
    if now_ms >= invite.expires_unix_ms:
        raise _wrong("the invite has expired; ask for a new one")
    if not 1 <= invite.uses <= MAX_USES:
        raise _wrong(f"an invite is for 1 to {MAX_USES} keys, not {invite.uses}")
    return invite


def needs_invite(policy: EnrolmentPolicy, miner: str) -> bool:
    """Return whether a key gets in by invite only. Raises `Invalid` (NOT_INVITED) where no invite would help."""
    if policy.mode in ("", "open") or miner in policy.allowed:
        return False
    if policy.mode != "invite":
        raise Invalid(
            "this run takes only keys on its list; ask its customer to name yours in the next job",
            reason=reasons_pb2.REASON_NOT_INVITED,
        )
    return True


def _wrong(text: str) -> Invalid:
    return Invalid(text, reason=reasons_pb2.REASON_INVITE_INVALID)
