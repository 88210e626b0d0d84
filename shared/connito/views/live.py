"""Live view of a run: a table on a terminal, one line per event elsewhere. Both are pure projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from connito.protocol.quorum import Pause, pause, turnout
from connito.protocol.rules import Stake, due_ms
from connito.render import formats
from connito.v1 import cycle_pb2, run_pb2
from connito.views import words
from connito.views.run_report import miner_name, submission_rows
from connito.views.sentences import detail_of, why_left
from connito.wire.enums import plain_name, reason_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.window import Window

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def who(facts: RunFacts, key: str, names: Mapping[str, str]) -> str:
    """Return the name a key is known by on this machine, or its label, or its start."""
    return names.get(key) or miner_name(facts, key)


def phase(facts: RunFacts, now_ms: int | None = None, here: Pause | None = None) -> str:
    """Return the current phase in one sentence, with the time left where the time is given. `here`: `quorum.pause` of it."""
    spec = facts.spec
    if spec is None:
        return "submitting the job"
    left = why_left(facts)
    if facts.ended is not None:
        return f"run {plain_name(run_pb2.RunOutcome, facts.ended.outcome)}" + (left and f"; {left}")
    if left:
        return left
    if facts.selection is None:
        return "selecting the experts that the domain uses"
    if facts.cycle == 0:
        return f"waiting for people: {turnout(len(facts.miners), len(facts.validators), spec.windows)}"
    window = facts.open_window
    if window is None:
        return f"cycle {facts.cycle} of {spec.cycles}: between windows"
    if here is not None:
        return f"cycle {window.cycle} of {spec.cycles}: paused, {here}"
    left = "" if now_ms is None else _left(facts, window, now_ms)
    return f"cycle {window.cycle} of {spec.cycles}: {window.name}, {words.WINDOWS[window.name]}{left}"


def _left(facts: RunFacts, window: Window, now_ms: int) -> str:
    fact = window.opened_fact
    if fact is None:
        return ""
    elapsed = formats.duration((now_ms - fact.time_unix_ms) / 1000, whole=True)
    if not (due := due_ms(facts, window)):
        return f" ({elapsed})"
    left = formats.duration((due - now_ms) / 1000, whole=True)
    return f" ({elapsed}; closes at the latest in {left})"


def announce(fact: Fact, facts: RunFacts, names: Mapping[str, str]) -> str | None:
    """Return the line for a new fact; None for facts that are not shown."""
    message = fact.message
    if isinstance(message, run_pb2.SelectionMade):
        return (
            f"selected {message.selected_experts} of {formats.count(message.total_experts, 'expert')} "
            f"in {formats.count(len(message.layers), 'layer')} "
            f"({formats.percent(message.target_parameters / max(1, message.model_parameters))} of the model)"
        )
    if isinstance(message, cycle_pb2.WindowOpened):
        window = fact.key.section
        return f"cycle {fact.key.cycle} · {window}: {words.WINDOWS[window]}"
    if isinstance(message, cycle_pb2.WindowClosed) and message.cause == cycle_pb2.CLOSE_CAUSE_DEADLINE:
        return f"cycle {fact.key.cycle} · {fact.key.section}: closed at its deadline"
    if isinstance(message, cycle_pb2.Refused):
        why = reason_name(message.reason)
        return f"cycle {fact.key.cycle} · {who(facts, message.miner, names)} refused: {why} ({detail_of(message)})"
    if isinstance(message, cycle_pb2.CycleScored):
        return _scored(message, facts, names)
    if isinstance(message, cycle_pb2.VersionPublished):
        return _published(message, facts, names)
    if isinstance(message, (run_pb2.RunEnded, run_pb2.ExpertDeposited, run_pb2.SelectionFailed)):
        return _ending(message)
    return None


def _scored(scored: cycle_pb2.CycleScored, facts: RunFacts, names: Mapping[str, str]) -> str:
    parts = []
    for verdict in sorted(scored.verdicts, key=lambda verdict: verdict.rank or 1 << 30):
        name, reason = who(facts, verdict.miner, names), reason_name(verdict.reason)
        parts.append(f"{name} +{verdict.utility:.4f} nats" if verdict.rank else f"{name} {reason or 'unranked'}")
    doubted = [
        f"{who(facts, standing.validator, names)} {reason_name(standing.reason)}, trust {standing.trust:.2f}"
        for standing in scored.validators
        if standing.reason and standing.trust
    ]
    lost = f"; loses weight: {', '.join(doubted)}" if doubted else ""
    return f"cycle {scored.cycle} · scored: {', '.join(parts) or 'nothing to score'}{lost}"


def _published(version: cycle_pb2.VersionPublished, facts: RunFacts, names: Mapping[str, str]) -> str:
    merged = ", ".join(who(facts, key, names) for key in version.merged) or "nobody"
    target = "".join(f"{loss.domain} loss {loss.before:.4f} → {loss.after:.4f}" for loss in list(version.losses)[:1])
    gate = plain_name(cycle_pb2.GateDecision, version.gate).replace("-", " ")
    return f"cycle {version.cycle} · version {version.version}: {target}; merged {merged}; gate: {gate}"


def _ending(message: run_pb2.RunEnded | run_pb2.ExpertDeposited | run_pb2.SelectionFailed) -> str:
    if isinstance(message, run_pb2.RunEnded):
        return f"run {plain_name(run_pb2.RunOutcome, message.outcome)}: {message.detail}"
    if isinstance(message, run_pb2.ExpertDeposited):
        return f"the library took in expert {message.expert_id}"
    return f"the selection failed: {reason_name(message.reason)} ({message.detail})"


def render(facts: RunFacts, names: Mapping[str, str], now_ms: int, stake: Stake) -> RenderableType:
    """Return the live view for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(f"{facts.run} · {phase(facts, now_ms, pause(facts, now_ms, stake))}", style="bold")
    ]
    if facts.versions:
        parts.append(_loss_table(facts))
    if facts.cycle:
        parts.append(_miner_table(facts, names))
    return Group(*parts)


def _loss_table(facts: RunFacts) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), title="held-out loss, nats per token", title_justify="left")
    for name in ("cycle", "target", "", "general", "", "gate", "merged"):
        table.add_column(name, justify="right")
    for cycle in facts.cycles():
        version = facts.version(cycle)
        if version is None or not version.losses:
            continue
        target, general = version.losses[0], list(version.losses)[1:]
        before = sum(loss.before for loss in general) / max(1, len(general))
        after = sum(loss.after for loss in general) / max(1, len(general))
        gate = plain_name(cycle_pb2.GateDecision, version.gate).replace("-", " ")
        table.add_row(
            str(cycle), f"{target.after:.4f}", _change(target.after - target.before),
            f"{after:.4f}", _change(after - before), gate, str(len(version.merged)),
        )  # fmt: skip
    return table


def _change(value: float) -> str:
    colour = "green" if value < 0 else "red" if value > 0 else "dim"
    return f"[{colour}]{value:+.4f}[/]"


def _miner_table(facts: RunFacts, names: Mapping[str, str]) -> Table:
    """Return the newest cycle that has news about miners."""
    from rich.table import Table

    cycle = facts.cycle
    if facts.window("commit", cycle).opened is None and cycle > 1:
        cycle -= 1
    table = Table(box=None, padding=(0, 2), title=f"miners, cycle {cycle}", title_justify="left")
    for name, justify in (("miner", "left"), ("status", "left"), ("reason", "left"), ("utility", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("rank", justify="right")
    table.add_column("reward", justify="right")
    colours = {"merged": "green", "refused": "red", "rejected": "red", "absent": "yellow"}
    for row in submission_rows(facts, cycle):
        style = colours.get(row["status"], "")
        table.add_row(
            who(facts, row["key"], names), row["status"], row["reason"], f"{row['utility']:.4f}" if row["rank"] else "",
            str(row["rank"] or ""), str(row["reward"] or ""), style=style,
        )  # fmt: skip
    return table
