"""An operator's acts on an installation's keys, one signed line each: `acts.jsonl` in the folder of keys.

A line holds the SHA-256 of the line before it, so none can be changed or taken out from between others; who wants to notice
that the last ones are gone keeps the hash of the newest elsewhere.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connito.errors import Invalid, VerificationFailed
from connito.wire.identity import Identity, verify

ROTATED = "rotate operator"


@dataclass(frozen=True)
class Acts:
    """The record in `folder`. `operator`: the key that signs."""

    folder: Path
    operator: Path

    @property
    def path(self) -> Path:
        """Return the file's path."""
        return self.folder / "acts.jsonl"

    def write(self, act: str, **about: Any) -> None:
        """Add a line: what was done, when, by which user of this machine, signed by the operator's key."""
        signer = Identity.load(self.operator)
        lines = self._lines()
        body = {
            "act": act,
            **about,
            "unix_ms": time.time_ns() // 1_000_000,
            "user": _user(),
            "by": signer.public,
            "previous": _hash(lines[-1]) if lines else "",
        }
        text = json.dumps(body, sort_keys=True)
        line = json.dumps({"body": text, "signature": signer.sign(text.encode()).hex()}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(line)

    def read(self) -> list[dict[str, Any]]:
        """Return every act, the oldest first. Raises `VerificationFailed` naming the first line that is not what was written."""
        rows: list[dict[str, Any]] = []
        previous, trusted = "", set[str]()
        for number, line in enumerate(self._lines(), 1):
            try:
                whole = json.loads(line)
                row, signature = dict(json.loads(whole["body"])), bytes.fromhex(whole["signature"])
                by = str(row["by"])
                genuine = verify(by, whole["body"].encode(), signature) and row["previous"] == previous
            except (ValueError, KeyError, TypeError, RecursionError):
                genuine, by, row = False, "", {}
            trusted = trusted or {by}
            if not genuine or by not in trusted:
                raise VerificationFailed(f"line {number} of {self.path} is not what an operator's key signed there")
            if row["act"] == ROTATED:
                trusted.add(str(row["key"]))
            previous = _hash(line)
            rows.append({**row, "hash": previous})
        own = Identity.load(self.operator).public
        if rows and own not in trusted:
            raise VerificationFailed(f"{self.path} was begun by another key than {own}, which never handed over to it")
        return rows

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise Invalid(f"{self.path} cannot be read ({error}); bring it back from a backup") from error


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A user id without a name.
        return str(os.getuid())
