"""Compare recomputed losses with recorded ones, within a tolerance."""

from __future__ import annotations

from dataclasses import dataclass

from connito.render import formats


@dataclass
class Distances:
    """Distances of recomputed losses from recorded ones, in nats per token, and the tolerance."""

    tolerance: float
    compared: int = 0
    exact: int = 0
    largest: float = 0.0

    def add(self, expected: float, found: float, tokens: int = 1) -> str:
        """Compare sums over `tokens`; what is wrong when they are too far apart."""
        self.compared += 1
        if expected == found or (expected != expected and found != found):
            self.exact += 1
            return ""
        distance = abs(expected - found) / max(tokens, 1)
        self.largest = max(self.largest, distance if distance == distance else float("inf"))
        if distance <= self.tolerance:
            return ""
        return f"{expected!r} recomputed, {found!r} in the log ({distance:.3g} nats per token apart)"

    def note(self) -> str:
        """Return a note on the differences of losses."""
        if not self.compared:
            return ""
        if self.exact == self.compared:
            return f"{formats.count(self.compared, 'loss')}, all equal to the bit"
        return (
            f"{formats.count(self.compared, 'loss')}, {self.exact} equal "
            f"to the bit, the others within {self.largest:.2g} nats per "
            f"token ({self.tolerance:g} is tolerated)"
        )
