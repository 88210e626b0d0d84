"""Printing on terminals and into files of any encoding."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_LOOKS = str.maketrans({
    "→": "->", "←": "<-", "…": "...", "–": "-", "—": "-", "·": "-", "•": "*", "×": "x", "−": "-", "‖": "||", "≤": "<=", "≥": ">=",
    "“": '"', "”": '"', "‘": "'", "’": "'", "█": "#", "✓": "ok", "✗": "x",
})  # fmt: skip


def print_anything() -> None:
    """Let standard output and error print every character: as itself, else as something alike, else as `?`."""
    codecs.register_error("connito.alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="connito.alike")


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(character: str) -> str:
    """Return ASCII that looks like a character: lines of boxes as lines, letters without their accents."""
    looks = character.translate(_LOOKS)
    if "─" <= character <= "╿":
        name = unicodedata.name(character)
        looks = "-" if "HORIZONTAL" in name and "VERTICAL" not in name and " AND " not in name else "+"
        looks = "|" if "VERTICAL" in name and "HORIZONTAL" not in name and " AND " not in name else looks
    plain = unicodedata.normalize("NFKD", looks).encode("ascii", "ignore").decode()
    return plain or "?"
