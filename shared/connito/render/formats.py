"""Write quantities for people, one form each: sizes, shares, durations, losses and moments."""

from __future__ import annotations

import re
from datetime import UTC, datetime

# Characters of a value that a sentence quotes.
SHOWN = 80


def size(count: float) -> str:
    """Return bytes in decimal units with three significant digits: `842 B`, `1.50 kB`, `12.3 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if round(value, 0 if unit == "B" else 1) < 1000:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def count(number: int, what: str) -> str:
    """Return how many there are of something: `1 cycle`, `2 cycles`, `3 entries`, `4 branches`."""
    if number != 1:
        what = re.sub("(?<=[^aeiou])y$", "ie", what) if what.endswith("y") else re.sub("(s|x|ch|sh)$", r"\1e", what)
        what += "s"
    return f"{number:,} {what}"


def percent(share: float, digits: int = 1) -> str:
    """Return a share of one in percent: `12.3 %`."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float, *, whole: bool = False) -> str:
    """Return a length of time: `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 07 min`; a negative one counts as none.

    `whole`: no fractions of a second, for a display that counts.
    """
    seconds = max(0.0, seconds)
    if seconds < 99.95:
        return f"{seconds:.{0 if whole else 2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def loss(nats: float | None) -> str:
    """Return a loss in nats per token with four decimals, a dash for none."""
    return "–" if nats is None else f"{nats:.4f}"


def change(nats: float | None) -> str:
    """Return a change of loss in nats per token with its sign, a dash for none."""
    return "–" if nats is None else f"{nats:+.4f}"


def moment(unix_ms: float) -> str:
    """Return a moment in UTC to the second: `2026-01-31 10:12:52 UTC`."""
    return f"{datetime.fromtimestamp(unix_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def day(unix_ms: float) -> str:
    """Return the date of a moment in UTC: `2026-01-31`."""
    return f"{datetime.fromtimestamp(unix_ms / 1000, UTC):%Y-%m-%d}"


def shown(value: object) -> str:
    """Return the beginning of a value as Python writes it; of a number with thousands of digits, that it is one."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a number with thousands of digits"
    return text if len(text) < SHOWN else text[:SHOWN] + "…"
