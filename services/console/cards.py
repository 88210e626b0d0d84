"""An expert's card as a page shows it: Markdown of the library, rendered without anything that could act on a reader."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from connito.library.schema import ExpertRecord
from markdown_it import MarkdownIt
from markupsafe import Markup

# What model hubs read, before the text itself.
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
# A card's pictures lie beside its file, not here.
_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)\n?")
# A table of names and values has a head without words, which is no head on a page.
_NO_HEAD = re.compile(r"<thead>\s*<tr>\s*(?:<th[^>]*></th>\s*)+</tr>\s*</thead>\s*")
# The page has a title and a heading of its own.
_DEEPER = {f"h{level}": f"h{min(6, level + 2)}" for level in range(1, 7)}


def as_html(card: str) -> Markup:
    """Return a card as HTML: tags that it holds are text, headings go below the page's, and wide tables scroll."""
    text = _PICTURE.sub("", _FRONT_MATTER.sub("", card.replace("\r\n", "\n")))
    parser = _parser()
    tokens = parser.parse(text)
    for token in tokens:
        token.tag = _DEEPER.get(token.tag, token.tag)
        # Pages allow no style in a tag: a column of numbers has a class.
        if token.attrs.pop("style", "") == "text-align:right":
            token.attrs["class"] = "num"
    html = str(parser.renderer.render(tokens, parser.options, {}))
    html = (
        _NO_HEAD.sub("", html)
        .replace("<table>", '<div class="scroll" tabindex="0"><table>')
        .replace("</table>", "</table></div>")
    )
    return Markup(html)  # noqa: S704 - the parser lets no tag of the card's through


@dataclass(frozen=True)
class Effect:
    """The effect of an expert on the loss of a domain, nats per token: `change` within `low` and `high`; negative is better."""

    domain: str
    before: float
    change: float
    low: float
    high: float
    tokens: int
    own: bool


def effects(record: ExpertRecord | None) -> list[Effect]:
    """Return the measured effects that a record tells, its own domain first."""
    found = []
    for row in () if record is None else record.get("losses", []):
        before, after = row["before"], row["after"]
        if before is not None and after is not None:
            low, high = row.get("change_low", after - before), row.get("change_high", after - before)
            own = record is not None and row["domain"] == record["domain"]
            found.append(Effect(str(row["domain"]), before, after - before, low, high, int(row["tokens"]), own))
    return sorted(found, key=lambda effect: not effect.own)


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")
