"""Lists, experts and reports as notebooks show them: builtins with a rich form, every word of a stranger's escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple, TypeVar, cast

from connito.library.plots import plots
from connito.library.schema import ExpertRecord
from connito.library.scores import as_rows, line
from connito.render import formats
from connito.v1.services_pb2 import ExpertSummary, RunPhase, RunStatus
from connito.views.loss_plot import loss_svg
from connito.wire.enums import plain_name

T = TypeVar("T")
# Rows of a table that a page shows.
MOST_ROWS = 200


class Rows(list[T]):
    """A list that a notebook and an interpreter show as a table."""

    def __repr__(self) -> str:
        shown = [{head: _plain(value) for head, value in _cells(row).items()} for row in self[:MOST_ROWS]]
        heads = {head: head for row in shown for head in row}
        wide = {head: max(len(row.get(head, "")) for row in (heads, *shown)) for head in heads}
        lines = ["  ".join(row.get(head, "").ljust(wide[head]) for head in heads).rstrip() for row in (heads, *shown)]
        left = [f"and {len(self) - MOST_ROWS} more"] if len(self) > MOST_ROWS else []
        return "\n".join([*lines, *left]) if shown else "none"

    def _repr_html_(self) -> str:
        shown = [_cells(row) for row in self[:MOST_ROWS]]
        heads = list(dict.fromkeys(head for row in shown for head in row))
        body = "".join(_line("td", [row.get(head, "") for head in heads]) for row in shown)
        left = f"<p>and {len(self) - MOST_ROWS} more</p>" if len(self) > MOST_ROWS else ""
        return (
            f"<table><thead>{_line('th', heads)}</thead><tbody>{body}</tbody></table>{left}" if shown else "<p>none</p>"
        )


class Card(dict[str, Any]):
    """An expert's row with its `record`, which a notebook shows as its card."""

    def _repr_html_(self) -> str:
        return _card(self["record"])


class Expert(NamedTuple):
    """An expert as a platform describes it, and its record, which a notebook shows as its card."""

    summary: ExpertSummary
    record: ExpertRecord

    def _repr_html_(self) -> str:
        return _card(self.record)


class Report(dict[str, Any]):
    """The report of a run, which a notebook shows as its outcome and its loss curve."""

    def _repr_html_(self) -> str:
        return _facts({"run": self["run"], "domain": self["domain"], **self["outcome"]}) + loss_svg(self)


def _plain(value: object) -> str:
    """Return a value's beginning as signs that every terminal shows."""
    shown = formats.shown(value)
    return (
        shown
        if not isinstance(value, str)
        else shown.removesuffix("…")[1:].removesuffix(shown[0]) + "…" * shown.endswith("…")
    )


def _card(record: Mapping[str, Any]) -> str:
    """Return the head of a card with its pictures; half a record has as much of it as there is."""
    selection = record.get("selection", {})
    facts = {
        "domain": record.get("domain", ""),
        "base": record.get("base", {}).get("name", ""),
        "experts": f"{selection.get('selected', '?')} of {selection.get('total', '?')}",
        "parameters": record.get("expert", {}).get("parameters", ""),
        "made": record.get("created", ""),
        "licence": record.get("license", "") or "not stated",
        "data": record.get("data_statement", "") or "not stated",
        **({"scores": line(record["scores"])} if record.get("scores") else {}),
    }
    head = f"<h3>{escape(str(record.get('expert_id', 'an expert')))}</h3>"
    return head + _facts(facts) + "".join(plots(cast("ExpertRecord", record)).values())


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<table>{rows}</table>"


def _line(tag: str, values: list[Any]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(value))}</{tag}>' for value in values)}</tr>"


def _cells(row: object) -> Mapping[str, Any]:
    if isinstance(row, RunStatus):
        phase = plain_name(RunPhase, row.phase)
        return {"run": row.spec.run, "domain": row.spec.domain, "phase": phase, "cycle": row.cycle,
                "version": row.version, "detail": row.detail}  # fmt: skip
    if isinstance(row, ExpertSummary):
        return {"expert_id": row.expert_id, "domain": row.domain, "run": row.run, "size": formats.size(row.expert.size),
                "standing": row.status or "good", "scores": line(as_rows(row.scores))}  # fmt: skip
    if isinstance(row, Mapping):
        return row
    to_json = getattr(row, "to_json", None)
    return to_json() if to_json is not None else {"": row}
