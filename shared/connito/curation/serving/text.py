"""Text of an answer as its tokens come: whole characters only, and nothing of a string that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# No character has so many tokens: more that make none are none of a character's.
OF_A_CHARACTER = 16


class Writer:
    """Turns tokens into text. `stops` end the answer and are not part of it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        """Begin an empty answer."""
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        # Tokens up to `_read` were written; decoding begins some before them, for spaces depend on what stands before.
        self._start = self._read = 0
        self._held, self._hold = "", max((len(stop) for stop in stops), default=1) - 1
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """Return what can be said now."""
        self._ids += ids
        self._held += self._new()
        for stop in sorted(self._stops, key=self._first):
            if (at := self._held.find(stop)) >= 0:
                self.stopped, text, self._held = True, self._held[:at], ""
                return text
        keep = min(self._hold, len(self._held))
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def rest(self) -> str:
        """Return what was held back, at the end of an answer that no string stopped."""
        text, self._held = self._held, ""
        return "" if self.stopped else text + self._decode(self._start)[len(self._decode(self._start, self._read)) :]

    def _first(self, stop: str) -> int:
        at = self._held.find(stop)
        return at if at >= 0 else len(self._held) + 1

    def _new(self) -> str:
        before, now = self._decode(self._start, self._read), self._decode(self._start)
        waits = len(now) <= len(before) or now.endswith("\ufffd")
        if waits and len(self._ids) - self._read < OF_A_CHARACTER:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int | None = None) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text
