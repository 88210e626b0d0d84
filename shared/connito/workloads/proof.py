"""Count what base and result get right of held-out text: next words, and answers that the text of a domain asks for.

Shares a person can judge, beside losses; with paired intervals over texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connito.moe.predictions import Likeliest

CONFIDENCE = 0.95
# Texts of the target and of a general domain that are asked about, and tokens of each that are read.
TEXTS, TOKENS, GENERAL_TEXTS, GENERAL_TOKENS = 144, 96, 8, 96

Right = dict[tuple[str, str], list[list[bool]]]

# What a domain's texts ask for: a pattern whose first group has to be given, and what that is called.
_TASKS: Mapping[str, tuple[str, str]] = {
    "math": (r"\nAnswer: ([^\n]+)", "solve an exercise"),
    "logs": (r" = (\d{3})", "give the status of a log line"),
    "ledgers": (r"\n[A-Z]+ \| [^|\n]+ \| ([A-Z]+)", "give the currency of an entry"),
    "recipes": (r"\n\w+ the \w+( until soft, then \w+ the) ", "say how a step of a recipe goes on"),
}
_ANY = (r"\n[^\n]* ([^\s]+)\n", "give the last word of a line")
# The same where every word of the group counts on its own: nobody gives a whole definition as its authors did.
_BY_WORD: Mapping[str, tuple[str, str]] = {
    "medical": (r"\A[^.\n]+\. ([^\n]+)", "complete the definition of a clinical finding, word by word"),
}


@dataclass(frozen=True)
class Asked:
    """A domain's texts, and in each the spans to give, by what they are."""

    texts: list[str]
    spans: dict[str, list[list[tuple[int, int]]]]

    @classmethod
    def of(cls, domain: str, texts: Sequence[str], *, is_target: bool) -> Asked:
        """Return the words of texts and, of the target's, the answers that they ask for."""
        from connito.moe.predictions import answers_of, words_of

        spans = {"next word": [words_of(text) for text in texts]}
        if is_target and domain in _BY_WORD:
            pattern, what = _BY_WORD[domain]
            spans[what] = [words_of(text, answers_of(text, pattern)) for text in texts]
        elif is_target:
            pattern, what = _TASKS.get(domain, _ANY)
            spans[what] = [answers_of(text, pattern) for text in texts]
        return cls(list(texts), spans)


def before_and_after(
    model: Any, tokenizer: Any, asked: Mapping[str, Asked], layers: Iterable[int], change: Callable[[], None]
) -> tuple[Right, Right]:
    """Return what a model gets right of the texts before `change()`, which writes rows of these layers, and after it."""
    from connito.moe.layout import require_moe_layers
    from connito.moe.predictions import Likeliest

    likeliest = Likeliest(model, require_moe_layers(model)[min(layers)].experts_name)
    before = _all_right(likeliest, tokenizer, asked)
    change()
    return before, _all_right(likeliest, tokenizer, asked)


def _all_right(likeliest: Likeliest, tokenizer: Any, asked: Mapping[str, Asked]) -> Right:
    """Return, for each domain and kind of span, which spans of each text are right; texts without any are left out."""
    from connito.moe.predictions import right

    found: Right = {}
    for domain, of in asked.items():
        groups = right(likeliest, tokenizer, of.texts, [*zip(*of.spans.values(), strict=True)])
        for number, kind in enumerate(of.spans):
            rows = [group[number] for group in groups if group[number]]
            if rows:
                found[domain, kind] = rows
    return found


def compared(before: Right, after: Right, target: str) -> list[dict[str, Any]]:
    """Return a row for each domain and kind: shares that are right, and the change with its interval."""
    return [_row(domain, what, before[domain, what], after[domain, what], domain == target) for domain, what in before]


def _row(domain: str, what: str, before: list[list[bool]], after: list[list[bool]], is_target: bool) -> dict[str, Any]:
    from connito.protocol.scoring.proof_of_loss import paired

    counts = [len(text) for text in before]
    # A gain is less of what is paired: so many are right, less than nothing.
    found = paired([-float(sum(text)) for text in before], [-float(sum(text)) for text in after], counts, CONFIDENCE)
    total = sum(counts)
    return {
        "domain": domain, "use": "target" if is_target else "general", "what": what,
        "before": sum(map(sum, before)) / total, "after": sum(map(sum, after)) / total,
        "change": found.effect, "low": max(-1.0, found.low), "high": min(1.0, found.high), "count": total, "texts": len(counts),
    }  # fmt: skip
