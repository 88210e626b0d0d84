"""Division of a cycle's emission: a policy gives relative shares, this module whole units that add up.

A policy is a function of the paid miners' utilities, best first, and the run's `RewardPolicy`; it returns one share a
miner. It decides proportions only: units are apportioned here, so no policy can emit more or less than the cycle has,
nor pay a worse rank more than a better one. An installation adds policies of its own as entry points of the group
`connito.payouts`; auditors need the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.metadata import entry_points

from connito.errors import Invalid
from connito.v1 import reasons_pb2, run_pb2

GROUP = "connito.payouts"
DEFAULT = "rank-table"
# Each paid rank earns half of the one before it, where the policy has no table.
HALVING = Fraction(1, 2)

Policy = Callable[[Sequence[Fraction], run_pb2.RewardPolicy], Sequence[Fraction | int]]


def rank_table(utilities: Sequence[Fraction], policy: run_pb2.RewardPolicy) -> list[Fraction]:
    """Return the table's share for each rank, nothing beyond it; without a table each rank has half of the one before."""
    if policy.rank_shares:
        table = [Fraction(share) for share in policy.rank_shares]
        return [table[place] if place < len(table) else Fraction(0) for place in range(len(utilities))]
    return [HALVING**place for place in range(len(utilities))]


def proportional(utilities: Sequence[Fraction], policy: run_pb2.RewardPolicy) -> list[Fraction]:
    """Return shares in proportion to utility."""
    return list(utilities)


_POLICIES: dict[str, Policy] = {DEFAULT: rank_table, "proportional": proportional}


def register(name: str, policy: Policy) -> None:
    """Add a policy to this process. Raises `Invalid` for a name that is taken."""
    if name in names():
        raise Invalid(f"a payout policy {name!r} exists already; choose another name")
    _POLICIES[name] = policy


def names() -> list[str]:
    """Return the policies that this installation knows, sorted."""
    return sorted({*_POLICIES, *(point.name for point in entry_points(group=GROUP))})


def find(name: str) -> Policy:
    """Return a policy by name, the rank table for none. Raises `Invalid` naming those that there are."""
    if (name or DEFAULT) in _POLICIES:
        return _POLICIES[name or DEFAULT]
    for point in entry_points(group=GROUP, name=name):
        policy: Policy = point.load()
        return policy
    raise Invalid(
        f"rewards.payout names {name!r}, which this installation does not know; choose one of {', '.join(names())}, or "
        f"install the package that registers it in the entry point group {GROUP}",
        reason=reasons_pb2.REASON_BAD_SPEC,
    )


def pay(utilities: Sequence[float], units: int, paid_ranks: int, policy: run_pb2.RewardPolicy) -> list[int]:
    """Return units for miners by their utilities (best first, above zero): nothing below `paid_ranks`, in the order of
    ranks.

    They sum to `units` where anybody's share is above zero, else to zero. Raises `Invalid` when a policy gives shares
    that are negative, not finite, not one a miner, or larger for a worse rank: its author has to repair it.
    """
    paid = [Fraction(utility) for utility in utilities[:paid_ranks]]
    try:
        shares = [Fraction(share) for share in find(policy.payout)(paid, policy)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise Invalid(f"the payout policy {policy.payout!r} does not give numbers: {error}") from error
    if len(shares) != len(paid) or any(share < 0 for share in shares) or shares != sorted(shares, reverse=True):
        raise Invalid(
            f"the payout policy {policy.payout!r} gave {len(shares)} shares for {len(paid)} ranks; it has to give one a "
            "rank, none negative, none larger than that of a better rank"
        )
    # Rounding can lift a rank by one unit above a better one when their exact shares are close; order is restored.
    return sorted(apportion(units, shares), reverse=True) + [0] * (len(utilities) - len(paid))


def apportion(units: int, shares: Sequence[Fraction]) -> list[int]:
    """Return whole units by share: the largest remainders get the units that rounding down leaves, the first of equal
    ones.

    They sum to `units`, or to zero where no share is above zero. Shares are ≥ 0.
    """
    total = sum(shares)
    if total <= 0:
        return [0] * len(shares)
    exact = [units * share / total for share in shares]
    whole = [int(amount) for amount in exact]
    by_remainder = sorted(range(len(shares)), key=lambda place: (whole[place] - exact[place], place))
    for place in by_remainder[: units - sum(whole)]:
        whole[place] += 1
    return whole
