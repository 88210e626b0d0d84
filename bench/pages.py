"""The pages that show published documents, and what renders each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import attacks_page, costs_page, library_page, sizing_page, systems_page, wire_page
from bench.evidence import ON_PAGE, Document
from bench.evidence import PAGE as EVIDENCE
from bench.evidence import render as render_evidence


@dataclass(frozen=True)
class Page:
    """A page, or a part of one: the documents that it is made from, and the page before -> the page as it should be."""

    path: Path
    names: tuple[str, ...]
    render: Callable[[str, Mapping[str, Document]], str]

    def written(self, documents: Mapping[str, Document]) -> str:
        """Return the page as it should be; as it is, where a document has not been published."""
        before = self.path.read_text()
        return self.render(before, documents) if all(name in documents for name in self.names) else before


def _part(path: Path, name: str, render: Callable[[str, Document], str]) -> Page:
    return Page(path, (name,), lambda page, documents: render(page, documents[name]))


EVERY = (
    Page(EVIDENCE, ON_PAGE, lambda _, documents: render_evidence(documents)),
    Page(costs_page.COSTS, ("engine", "goals"), costs_page.render_costs),
    _part(costs_page.COSTS, "gpu_check", costs_page.render_gpu),
    _part(systems_page.PAGE, "systems", lambda _, document: systems_page.render(document)),
    *(_part(library_page.PAGE, name, library_page.render) for name in library_page.PARTS),
    Page(
        wire_page.PAGE,
        wire_page.NAMES,
        lambda _, documents: wire_page.render(*(documents[name] for name in wire_page.NAMES)),
    ),
    _part(attacks_page.PAGE, "work_rates", attacks_page.render),
    _part(attacks_page.PAGE, "claim_lies", attacks_page.render_claims),
    _part(attacks_page.PAGE, "work_again", attacks_page.render_again),
    _part(attacks_page.PAGE, "merge_lies", attacks_page.render_merges),
    _part(attacks_page.PAGE, "gate_drift", attacks_page.render_drift),
    _part(attacks_page.PAGE, "trigger", attacks_page.render_triggers),
    *(_part(sizing_page.PAGE, name, sizing_page.render) for name in sizing_page.PARTS),
    *(
        _part(
            sizing_page.AVAILABILITY,
            name,
            lambda page, document: sizing_page.render(page, document, sizing_page.AVAILABILITY_PARTS),
        )
        for name in sizing_page.AVAILABILITY_PARTS
    ),
)
# What a page does not show is in the lab notes.
NAMES = (*dict.fromkeys(name for page in EVERY for name in page.names), "schedules")
