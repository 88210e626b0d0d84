"""The reward ledger: what each cycle paid to whom. A pure projection of the log, so it grows and never changes.

Each cycle's entries are the units of its `merge.scored` fact, miners, then validators, then what nobody earned; they
sum to the run's emission to the last unit, and `check` says so or names the cycle where they do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from connito.render import formats
from connito.v1 import cycle_pb2
from connito.views.run_report import miner_name
from connito.wire.enums import reason_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts

MINER, VALIDATOR, UNALLOCATED = "miner", "validator", "unallocated"


@dataclass(frozen=True)
class Entry:
    """`units` paid to `account` (a public key; empty for what nobody earned) for `why`. `sequence` is the fact's, in MERGE.

    `balance` is what the account holds with this entry.
    """

    cycle: int
    account: str
    name: str
    role: str
    units: int
    balance: int
    why: str
    sequence: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `connito ledger --json` prints."""
        return asdict(self)


def entries(facts: RunFacts) -> list[Entry]:
    """Return every entry of a run in the order of cycles. Nothing paid is an entry too, for everybody that was judged."""
    balances: dict[tuple[str, str], int] = {}
    found = []
    for cycle in facts.cycles():
        fact = facts.scored_fact(cycle)
        if fact is None:
            continue
        for account, role, units, why in _paid(fact):
            balance = balances[role, account] = balances.get((role, account), 0) + units
            name = miner_name(facts, account) if account else ""
            found.append(Entry(cycle, account, name, role, units, balance, why, fact.sequence))
    return found


def _paid(fact: Fact[cycle_pb2.CycleScored]) -> Iterator[tuple[str, str, int, str]]:
    scored = fact.message
    for verdict in sorted(scored.verdicts, key=lambda verdict: (verdict.rank or 1 << 30, verdict.miner)):
        yield verdict.miner, MINER, verdict.reward, _why(verdict)
    for standing in scored.validators:
        if standing.reward or standing.trust:
            yield standing.validator, VALIDATOR, standing.reward, f"trust {standing.trust:.3f}"
    yield "", UNALLOCATED, scored.unallocated, "nobody earned it"


def _why(verdict: cycle_pb2.Verdict) -> str:
    reason = reason_name(verdict.reason)
    withheld = f", {verdict.withheld} withheld" if verdict.withheld else ""
    return (f"rank {verdict.rank}" if verdict.rank else "unranked") + (f", {reason}" if reason else "") + withheld


def check(facts: RunFacts, ledger: Iterable[Entry]) -> list[str]:
    """Return cycles whose entries do not come to the run's emission; empty when every unit is accounted for."""
    spent: dict[int, int] = {}
    for entry in ledger:
        spent[entry.cycle] = spent.get(entry.cycle, 0) + entry.units
    emission = facts.spec.emission if facts.spec is not None else 0
    return [
        f"cycle {cycle}: {formats.count(units, 'unit')} for {emission}"
        for cycle, units in spent.items()
        if units != emission
    ]


def balances(ledger: Iterable[Entry]) -> list[Entry]:
    """Return each account's last entry, the largest balance first."""
    last = {(entry.role, entry.account): entry for entry in ledger}
    order = {MINER: 0, VALIDATOR: 1, UNALLOCATED: 2}
    return sorted(last.values(), key=lambda entry: (order[entry.role], -entry.balance, entry.account))
