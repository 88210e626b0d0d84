"""Cards are shown as pages, and nothing in one acts on its reader; experts are shown to those who may see them."""

from __future__ import annotations

import pytest
from connito.wire.roster import Roster

from services.console.cards import as_html
from services.console.experts import seen_by
from tests.support.run import Run

CARD = """---
license: mit
---
# Expert

![change of the loss](losses.svg)

| domain | before |
|---|---:|
| law | 3.1 |

[bad](javascript:alert(1)) <script>alert(1)</script> **bold** `<b>`
"""


def test_a_card_is_rendered_and_harmless() -> None:
    html = as_html(CARD)
    assert "<h3>Expert</h3>" in html
    assert '<td class="num">3.1</td>' in html
    assert '<div class="scroll" tabindex="0"><table>' in html
    assert "<th></th>" not in as_html("| | |\n|---|---|\n| version | 3 |\n"), (
        "a screen reader finds no head without words"
    )
    assert "<strong>bold</strong>" in html
    assert "&lt;script&gt;" in html
    for unwanted in ("style=", "license: mit", "losses.svg", "<script", 'href="javascript', "<b>", "<img"):
        assert unwanted not in html, unwanted


@pytest.mark.parametrize(
    ("visibility", "who", "seen"),
    [
        ("public", "nobody", True), ("", "nobody", True), ("private", "nobody", False), ("private", "owner", True),
        ("private", "operator", True), ("private", "colleague", False), ("organisation", "colleague", True),
        ("organisation", "nobody", False),
    ],
)  # fmt: skip
def test_an_expert_is_shown_to_whom_it_is_for(visibility: str, who: str, *, seen: bool) -> None:
    roster = Roster({"operator": frozenset({"operator"})}, organisations={"lab": frozenset({"colleague"})})
    facts = Run().created(visibility=visibility, organisation="lab", customer="owner").facts
    assert seen_by(who, roster)(facts, None) is seen
