"""The subject grammar.

Facts            `connito.v1.<run>.<window>.<cycle>.<kind>[.<id>]`
Parts of a fact  `<subject of the fact>.part.<digest of its payload>.<number>`
What miners say  `connito.v1.<run>.ingress.<miner>.<kind>`
Dead letters     `connito.dlq.v1.<stream>.<sequence>`

Every fact has a subject of its own, and the broker admits one message per fact subject (see `Bus.publish_fact`): a
duplicate is impossible rather than detected.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from connito.errors import Invalid
from connito.v1 import cycle_pb2

ROOT = "connito.v1"
DLQ_ROOT = "connito.dlq.v1"
SECURITY_ROOT = "connito.security.v1"
WINDOWS = ("train", "commit", "submit", "validate", "merge")
# Where facts stand that are about every run; no run may be called so.
INSTALLATION = "installation"
# And what the library is told of more than one run.
LIBRARY = "library"
SECTIONS = ("run", *WINDOWS, "library")

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,80}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# As it is written by `fact`: ASCII digits, no leading zero, at most what a uint32 holds.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")


def check_token(text: str, what: str) -> str:
    """Return `text` if it can stand as one subject token, else raise `Invalid` naming `what`."""
    if not _TOKEN.fullmatch(text):
        raise Invalid(f"{what} {text!r} may hold only letters, digits, '-' and '_' (1 to 80 of them)")
    return text


class FactKey(NamedTuple):
    """The key of a fact. `section` is `run`, a window, or `library`; `id` is empty for facts of which there is one."""

    section: str
    cycle: int
    kind: str
    id: str = ""


def part(subject: str, digest: str, number: int) -> str:
    """Return the subject of a part of a fact's payload, whose SHA-256 is `digest` (hex)."""
    return f"{subject}.part.{digest}.{number}"


def parse_part(subject: str) -> tuple[str, str, int] | None:
    """Return a fact's subject, the digest of its payload and the number of the part; None for what is no part's subject."""
    parts = subject.rsplit(".", 3)
    if len(parts) != 4 or parts[1] != "part":
        return None
    if not _DIGEST.fullmatch(parts[2]) or not _NUMBER.fullmatch(parts[3]):
        raise Invalid(f"{subject!r} is not the subject of a part")
    return parts[0], parts[2], int(parts[3])


def window_value(window: str) -> cycle_pb2.Window.ValueType:
    """Return the value on the wire of a window's name."""
    return cycle_pb2.Window.Value(f"WINDOW_{window.upper()}")


def fact(run: str, section: str, cycle: int, kind: str, id_: str = "") -> str:
    """Return the subject of a fact."""
    check_token(run, "run id")
    base = f"{ROOT}.{run}.{section}.{cycle}.{kind}"
    return f"{base}.{check_token(id_, 'id')}" if id_ else base


def ingress(run: str, miner: str, kind: str) -> str:
    """Return the subject on which `miner` (a public key) says `kind`: trained, commitment or reveal."""
    return f"{ROOT}.{check_token(run, 'run id')}.ingress.{check_token(miner, 'miner')}.{kind}"


def parse_fact(subject: str) -> tuple[str, FactKey]:
    """Run and key of a fact's subject. Raises `Invalid` if it is not one."""
    parts = subject.split(".")
    if (
        len(parts) not in (6, 7)
        or ".".join(parts[:2]) != ROOT
        or parts[3] not in SECTIONS
        or not _NUMBER.fullmatch(parts[4])
    ):
        raise Invalid(f"{subject!r} is not the subject of a fact")
    return parts[2], FactKey(parts[3], int(parts[4]), parts[5], parts[6] if len(parts) == 7 else "")


def is_ingress(subject: str) -> bool:
    """Return whether a miner's message stands there, well formed or not."""
    return ".ingress." in subject


def run_of(subject: str) -> str:
    """Return the run that a subject belongs to, well formed or not; the empty string where it names none."""
    return "".join(subject.split(".")[2:3])


def parse_ingress(subject: str) -> tuple[str, str, str]:
    """Run, miner and kind of an ingress subject. Raises `Invalid` if it is not one."""
    parts = subject.split(".")
    if len(parts) != 6 or ".".join(parts[:2]) != ROOT or parts[3] != "ingress":
        raise Invalid(f"{subject!r} is not an ingress subject")
    return parts[2], parts[4], parts[5]


def inbox_prefix(key: str) -> str:
    """Return where `key` receives the broker's replies. Nobody else may subscribe there."""
    return f"_INBOX.{key}"
