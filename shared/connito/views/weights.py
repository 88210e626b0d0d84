"""The ledger's units as weights of a Bittensor subnet: which share each UID has, in the whole numbers that a chain takes.

The chain wants weights as u16, the largest 65,535, and refuses a vector in which one exceeds the subnet's `MaxWeightsLimit` of
the sum, or that has fewer than `MinAllowedWeights` entries. What is left of a weight above the limit goes to the others
in proportion. Everything is exact until the rounding, so two exporters of one log get the same vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from math import ceil

from connito.errors import Invalid
from connito.views.ledger import MINER, Entry

U16_MAX = 65535


def earned(ledger: Iterable[Entry], first: int, last: int) -> dict[str, int]:
    """Return the units of each miner over the cycles `first` to `last` inclusive, nobody with nothing.

    Raises `Invalid` where one of these cycles has not been paid.
    """
    units: dict[str, int] = {}
    within = [entry for entry in ledger if first <= entry.cycle <= last]
    if not 0 < last - first + 1 == len({entry.cycle for entry in within}):
        raise Invalid(f"not every cycle from {first} to {last} has been paid; `connito ledger` shows those that were")
    for entry in within:
        if entry.role == MINER and entry.units:
            units[entry.account] = units.get(entry.account, 0) + entry.units
    return units


def vector(units: Mapping[int, int], max_weight: int = U16_MAX, min_allowed: int = 0) -> dict[int, int]:
    """Return u16 weights by UID (ascending), the largest 65,535, none of them 0 or above `max_weight`/65,535 of their sum.

    Raises `Invalid` where no vector is like that: with fewer than `min_allowed` UIDs that earned, or too few for the limit.
    """
    paid = {uid: amount for uid, amount in sorted(units.items()) if amount > 0}
    if not paid:
        raise Invalid("nobody who has a UID earned anything in these cycles; choose others, or bind more miners")
    if not 0 <= min(paid) <= max(paid) <= U16_MAX:
        raise Invalid(f"a UID is {min(paid)} to {max(paid)}; UIDs are 0 to {U16_MAX}")
    if not 1 <= max_weight <= U16_MAX:
        raise Invalid(f"a maximum weight of {max_weight} is none; give the subnet's MaxWeightsLimit, 1 to {U16_MAX}")
    needed = ceil(Fraction(U16_MAX, max_weight))
    if len(paid) < needed:
        raise Invalid(
            f"{len(paid)} UIDs earned, and a maximum of {max_weight} of {U16_MAX} each needs {needed}: no weights keep to "
            "it; take more cycles, or bind more miners"
        )
    weights = _rounded(_capped(paid, Fraction(max_weight, U16_MAX)), max_weight)
    if len(weights) < min_allowed:
        raise Invalid(
            f"{len(weights)} UIDs have weight, and the subnet wants {min_allowed}; take more cycles, or bind more miners"
        )
    return weights


def _capped(units: Mapping[int, int], limit: Fraction) -> dict[int, Fraction]:
    """Cut the largest amounts to one height, at which each is `limit` of what remains in all."""
    amounts = sorted(units.values())
    if len(amounts) * limit == 1:
        return dict.fromkeys(units, Fraction(1))
    height, below, cut = Fraction(amounts[-1]), sum(amounts), 0
    if height > limit * below:
        # With the `cut` largest at one height: height = limit · (below + cut · height).
        while not cut or height < amounts[-cut - 1]:
            cut += 1
            below -= amounts[-cut]
            height = limit * below / (1 - limit * cut)
    return {uid: min(Fraction(amount), height) for uid, amount in units.items()}


def _rounded(heights: Mapping[int, Fraction], max_weight: int) -> dict[int, int]:
    """Scale the largest to 65,535: to the nearest, as the SDK does; upwards where the largest would exceed its limit."""
    scale = U16_MAX / max(heights.values())
    nearest = {uid: value for uid, height in heights.items() if (value := round(height * scale))}
    if max_weight * sum(nearest.values()) >= U16_MAX * U16_MAX:
        return nearest
    return {uid: ceil(height * scale) for uid, height in heights.items()}
