"""Bans in force at a sequence of the log, from a run's facts. Pure.

A ban is a fact in RUNS and so has a sequence; a window's close names the last sequence of RUNS that counts in it and the
miners that are banned by then. Whoever settles, scores or audits a window goes by that list, so that all of them agree
on whether a ban came in time, whatever they had read when they decided.
"""

from __future__ import annotations

from connito.errors import Invalid
from connito.protocol.findings import Refusal
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.envelope import check
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.roster import OPERATOR, Roster

ORDER_SUBJECT = "rpc.BanMiner"


def standing(facts: RunFacts, miner: str, until: int | None = None) -> run_pb2.MinerBan | None:
    """Return the last word about a key, a ban or its lifting, among what RUNS holds up to sequence `until`; None if
    none.
    """
    return _latest_orders(facts, until).get(miner)


def number_after(facts: RunFacts, miner: str) -> int:
    """Return the number of the next ban, or lifting, of a key."""
    last = standing(facts, miner)
    return 1 if last is None else last.number + 1


def banned(facts: RunFacts, until: int | None = None) -> dict[str, run_pb2.MinerBan]:
    """Return miners that are banned by sequence `until` of RUNS (all that is known, if None), with the ban."""
    return {miner: ban for miner, ban in sorted(_latest_orders(facts, until).items()) if not ban.lifted}


def at_close(facts: RunFacts, window: str, cycle: int) -> dict[str, Refusal]:
    """Return the miners whose ban counts in a closed window, with their refusal. Nobody while it is open."""
    closed = facts.window(window, cycle).closed
    known = banned(facts, closed.runs_sequence) if closed is not None else {}
    return {} if closed is None else {miner: refusal(known.get(miner)) for miner in closed.banned}


def refusal(ban: run_pb2.MinerBan | None) -> Refusal:
    """Return the refusal of a banned miner, with the words of whoever banned it."""
    finding = Finding(kind=cycle_pb2.FINDING_KIND_BANNED, text="" if ban is None else ban.why)
    return Refusal(reasons_pb2.REASON_BANNED, finding)


def check_order(ban: run_pb2.MinerBan, roster: Roster, customer: str) -> None:
    """Raise `Invalid` unless an operator, or the run's customer, has ordered just this."""
    opened = check(ban.order, ORDER_SUBJECT)
    order = opened.read(run_pb2.BanOrder)
    may = roster.permits(OPERATOR, opened.signer) or (order.run != "" and opened.signer == customer)
    if not may:
        raise Invalid(
            f"{short_key(opened.signer)} is neither an operator nor the run's customer",
            reason=reasons_pb2.REASON_NOT_PERMITTED,
        )
    if (order.miner, order.lifted) != (ban.miner, ban.lifted) or order.run not in ("", ban.run):
        raise Invalid("the order is not the one of this ban", reason=reasons_pb2.REASON_NOT_PERMITTED)


def _latest_orders(facts: RunFacts, until: int | None) -> dict[str, run_pb2.MinerBan]:
    last: dict[str, run_pb2.MinerBan] = {}
    for fact in facts.bans.values():
        ban = fact.message
        counts = until is None or fact.sequence <= until
        if counts and (ban.miner not in last or last[ban.miner].number < ban.number):
            last[ban.miner] = ban
    return last
