"""The rules of drawing, of the quorum and of closing a window: one set, for whoever acts in a cycle and whoever audits it.

An operator holds the coordinator's key, and may decide when a window closes and who is in a draw. These rules leave no choice
that a reader of the log could not see: validators refuse to score a cycle that breaks one, the aggregator judges nobody in
it, and an audit names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from connito.protocol.beacon import draw_seed, opens
from connito.protocol.scoring.counted_reports import Reports, draw
from connito.protocol.scoring.trust import votes
from connito.v1 import cycle_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import WINDOWS
from connito.wire.window import Window

Stake = Callable[[str], float]
# Broker times of different streams may come from different machines, and a decision is stored a moment after the clock was read.
TOLERANCE_MS = 1000
# Windows that wait for the first to be heard, for so many ceilings at most: where nobody is, something is away that all need.
WAITS_FOR_ONE, CEILINGS = ("commit", "submit", "validate"), 3


def electorate(facts: RunFacts, cycle: int) -> list[str]:
    """Return the validators that had joined when the head before a cycle was written, whether they act in it or not. Empty
    before it is known. RUNS holds both in their order, so every reader of it gives the same answer.
    """
    head = facts.head(cycle)
    return [key for key, fact in facts.joined.items() if head is not None and fact.sequence < head.sequence]


def committed_in_time(facts: RunFacts, cycle: int) -> list[str]:
    """Return the validators whose commitment to a secret lies before the close of the train window, in the same stream."""
    closed = facts.window("train", cycle).closed_fact
    commitments = facts.seed_commitments(cycle).items()
    return [key for key, fact in commitments if closed is None or fact.sequence < closed.sequence]


def secrets(facts: RunFacts, window: Window) -> dict[str, bytes]:
    """Return revealed secrets that open what each named validator committed to, by validator."""
    committed, revealed = facts.seed_commitments(window.cycle), facts.seed_reveals(window.cycle)
    return {
        key: revealed[key].message.secret
        for key in window.expected
        if key in committed
        and key in revealed
        and opens(committed[key].message.digest, facts.run, window.cycle, key, revealed[key].message.secret)
    }


def still_drawing(facts: RunFacts, window: Window) -> list[str]:
    """Return the named validators that have revealed their secret, or still may: unless it is known to be wrong."""
    good, known = (
        secrets(facts, window),
        facts.seed_reveals(window.cycle).keys() & facts.seed_commitments(window.cycle).keys(),
    )
    return [key for key in window.expected if key in good or key not in known]


def weighs(facts: RunFacts, cycle: int, who: Collection[str], stake: Stake) -> tuple[float, float]:
    """Return the votes of some validators, and of all that could have been there."""
    weight = votes(facts, cycle, stake)
    everybody = {*electorate(facts, cycle), *who}
    return sum(map(weight, sorted(who))), sum(map(weight, sorted(everybody)))


def quorum_of_draw(facts: RunFacts, cycle: int, who: Collection[str], stake: Stake) -> bool:
    """Return whether these validators may draw: as many as the policy asks for, and more than half of the votes of all that
    joined.
    """
    if not who or len(who) < facts.require_spec().windows.min_validators:
        return False
    mine, total = weighs(facts, cycle, who, stake)
    return 2 * mine > total


def half_time_ms(window: Window) -> int:
    """Return the time until which a draw waits for every secret."""
    opened = window.opened_fact
    assert opened is not None
    return opened.time_unix_ms + max(0, window.deadline_unix_ms - opened.time_unix_ms) // 2


def deadline_ms(facts: RunFacts, window: Window) -> int:
    """Return the time at which an open window may be closed on those who have not acted; both times are the broker's.

    That is what was announced, and never sooner than the policy's floor. A draw that an outage delayed leaves as much time
    to score as one made in time, and the first who is heard late as much to the others.
    """
    opened, deadline = window.opened_fact, window.deadline_unix_ms
    assert opened is not None
    half = max(0, deadline - opened.time_unix_ms) // 2
    policy = facts.require_spec().windows
    deadline = max(deadline, opened.time_unix_ms + round(policy.floor_seconds * 1000))
    if unheard(facts, window):
        deadline = max(deadline, opened.time_unix_ms + round(CEILINGS * policy.ceiling_seconds * 1000))
    elif window.name in WAITS_FOR_ONE:
        deadline = max(deadline, half + min(fact.time_unix_ms for _, fact in _heard(facts, window)))
    if window.name == "validate" and window.drawn_fact is not None:
        deadline = max(deadline, window.drawn_fact.time_unix_ms + half)
    return deadline


def due_ms(facts: RunFacts, window: Window) -> int:
    """Return until when an open window waits, as people are told it: what was announced, longer where the first was heard late;
    0 for one without a deadline. Nobody being heard, a run is paused from what was announced."""
    announced = window.deadline_unix_ms
    known = announced and facts.spec is not None and not unheard(facts, window)
    return deadline_ms(facts, window) if known else announced


def unheard(facts: RunFacts, window: Window) -> bool:
    """Return whether nobody at all was heard in a window before it closed."""
    return window.name in WAITS_FOR_ONE and next(_heard(facts, window), None) is None


def readable(facts: RunFacts, cycle: int) -> bool:
    """Return whether what the rules of a cycle rest on in other streams has been read: who had joined, and what votes weigh."""
    return facts.head(cycle) is not None and (cycle == 1 or facts.scored(cycle - 1) is not None)


def fault(facts: RunFacts, cycle: int, stake: Stake) -> Finding | None:
    """Return the first rule that a cycle breaks, as far as it has come and without what miners say; None while it breaks none."""
    return next(faults(facts, cycle, stake, said=False), None)


def faults(facts: RunFacts, cycle: int, stake: Stake, *, said: bool) -> Iterator[Finding]:
    """Yield every rule that a cycle breaks, as far as it has come. `said`: what miners say is known too (INGRESS)."""
    for name in WINDOWS:
        window = facts.window(name, cycle)
        if name == "validate" and window.opened is not None and facts.window("train", cycle).closed is not None:
            yield from _draw(facts, window, stake)
        if window.opened is not None and window.closed is not None:
            yield from _close(facts, window, stake, said)


def _draw(facts: RunFacts, window: Window, stake: Stake) -> Iterator[Finding]:
    named, due = set(window.expected), set(committed_in_time(facts, window.cycle))
    if named != due:
        yield Finding(kind=cycle_pb2.FINDING_KIND_RULE_NAMED, miners=sorted(named ^ due))
    fact = window.drawn_fact
    if fact is None:
        return
    drawn, half, good = fact.message, half_time_ms(window), secrets(facts, window)
    reveals, chosen = facts.seed_reveals(window.cycle), set(drawn.validators)
    in_time = {key for key in good if reveals[key].time_unix_ms < half - TOLERANCE_MS}
    in_cut = {key for key in good if reveals[key].sequence <= drawn.last_sequence}
    if left_out := (in_time | in_cut) - chosen:
        yield Finding(kind=cycle_pb2.FINDING_KIND_RULE_DRAW, miners=sorted(left_out))
    else:
        yield from _seed(facts, window)
    early = half - TOLERANCE_MS - fact.time_unix_ms
    waiting = [key for key in named - chosen if key not in reveals or reveals[key].sequence > drawn.last_sequence]
    if waiting and early > 0:
        yield Finding(kind=cycle_pb2.FINDING_KIND_RULE_EARLY, name="draw", count=early)
    if not quorum_of_draw(facts, window.cycle, chosen, stake):
        mine, total = weighs(facts, window.cycle, chosen, stake)
        limit = facts.require_spec().windows.min_validators
        kind = cycle_pb2.FINDING_KIND_RULE_QUORUM
        yield Finding(kind=kind, weight=mine, total_weight=total, count=len(chosen), limit=limit)


def _seed(facts: RunFacts, window: Window) -> Iterator[Finding]:
    """Check that the seed is the hash of secrets that were committed to, and revealed before it was drawn."""
    fact = window.drawn_fact
    if fact is None:
        return
    good, reveals = secrets(facts, window), facts.seed_reveals(window.cycle)
    cut = min(fact.sequence, fact.message.last_sequence)
    known = {key: good[key] for key in fact.message.validators if key in good and reveals[key].sequence <= cut}
    if wrong := sorted(set(fact.message.validators) - set(known)):
        yield Finding(kind=cycle_pb2.FINDING_KIND_RULE_DRAW, miners=wrong)
    elif fact.message.seed != (draw_seed(facts.run, window.cycle, known) if known else b""):
        yield Finding(kind=cycle_pb2.FINDING_KIND_RULE_SEED)


def _close(facts: RunFacts, window: Window, stake: Stake, said: bool) -> Iterator[Finding]:
    fact = window.closed_fact
    assert fact is not None
    if window.name == "merge":
        # It has no deadline: it closes behind its version.
        return
    if fact.message.cause == cycle_pb2.CLOSE_CAUSE_DEADLINE:
        early = deadline_ms(facts, window) - TOLERANCE_MS - fact.time_unix_ms
        if early > 0:
            yield Finding(kind=cycle_pb2.FINDING_KIND_RULE_EARLY, name=window.name, count=early)
        return
    idle = sorted(set(_named(facts, window, stake, said)) - _acted(facts, window))
    if idle:
        yield Finding(kind=cycle_pb2.FINDING_KIND_RULE_WAITING, name=window.name, miners=idle)


def _named(facts: RunFacts, window: Window, stake: Stake, said: bool) -> Collection[str]:
    """Return those whom a window had to wait for: not who was banned by its close, nor whose ban was lifted meanwhile."""
    if window.name == "validate":
        drawn = window.drawn_fact
        if drawn is None:
            # Nothing can be drawn once even all that could still reveal are too few.
            possible = still_drawing(facts, window)
            return possible if quorum_of_draw(facts, window.cycle, possible, stake) else ()
        return drawn.message.validators
    closed = window.closed
    out = {ban.message.miner for ban in facts.bans.values()} | set(closed.banned if closed is not None else ())
    # What a miner says of its training is in INGRESS alone.
    unheard = set() if said or window.name != "train" else set(window.expected) - set(facts.validators)
    return (set(window.expected) | _owed(facts, window, said)) - out - unheard


def _owed(facts: RunFacts, window: Window, said: bool) -> set[str]:
    """Return the miners that a window has to wait for whomever it names: an operator could leave one out of its own list, and
    close behind the others. Those who committed; or who were awaited in training, and said in time that it is over.
    """
    if window.name == "submit":
        settled = facts.window("commit", window.cycle).settled
        return set() if settled is None else set(settled.committed)
    train = facts.window("train", window.cycle)
    if window.name != "commit" or not said or train.closed_fact is None:
        return set()
    cut, until = train.closed_fact.message.last_sequence, train.closed_fact.time_unix_ms - TOLERANCE_MS
    trained = facts.trained(window.cycle).items()
    return {
        key for key, fact in trained if key in train.expected and fact.sequence <= cut and fact.time_unix_ms < until
    }


def _acted(facts: RunFacts, window: Window) -> set[str]:
    """Return those who acted in a window before it closed."""
    closed, cycle = window.closed_fact, window.cycle
    assert closed is not None
    if window.name == "train":
        last = closed.message.last_sequence
        trained = {key for key, fact in facts.trained(cycle).items() if fact.sequence <= last}
        return trained | set(committed_in_time(facts, cycle))
    return {key for key, _ in _heard(facts, window)}


def _heard(facts: RunFacts, window: Window) -> Iterator[tuple[str, Fact]]:
    """Yield who reported in a validate window, or was answered in another one, before it closed; that lies in its own stream."""
    closed = window.closed_fact
    if window.name == "validate":
        said = [*facts.reports(window.cycle).items(), *facts.objections(window.cycle).items()]
    else:
        said = [(fact.message.miner, fact) for fact in window.refused.values()] + [*window.accepted.items()]
    return ((key, fact) for key, fact in said if closed is None or fact.sequence < closed.sequence)


def objectors(facts: RunFacts, cycle: int, stake: Stake) -> bool:
    """Return whether validators with half of the votes object to a cycle: there can be no quorum in it, nor ought there to be."""
    if not facts.objections(cycle):
        return False
    mine, total = weighs(facts, cycle, set(facts.objections(cycle)) & set(electorate(facts, cycle)), stake)
    return 2 * mine >= total > 0


def quorum_fault(facts: RunFacts, cycle: int, reports: Reports, stake: Stake) -> Finding | None:
    """Return why the reports are too few to judge anyone; None when they suffice.

    A cycle that breaks a rule judges nobody. The draw had its quorum of validators; of the weight of their votes, and of all that
    joined, more than half must have reported. A validator that fell silent after its reveal then costs nobody the cycle, and a
    lying minority is not made a majority by it. Where the seed assigns submissions, one
    whose assigned validators mostly fell silent is told so in its verdict.
    """
    drawn = draw(facts, cycle)
    if (broken := fault(facts, cycle, stake)) is not None:
        return broken
    if drawn is None:
        return Finding(kind=cycle_pb2.FINDING_KIND_NOTHING_DRAWN)
    weight = votes(facts, cycle, stake)
    total = sum(weight(validator) for validator in sorted({*drawn.validators, *electorate(facts, cycle)}))
    reported = sum(weight(validator) for validator in reports.counted)
    if reported <= total / 2:
        return Finding(kind=cycle_pb2.FINDING_KIND_QUORUM_MISSED, weight=reported, total_weight=total)
    return None
