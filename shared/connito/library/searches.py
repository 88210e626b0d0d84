"""Log of searches on a shelf, one line each, beside the journal. It shows which experts are asked for and missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from connito.data.documents import parse_json
from connito.library.training_demand import Search

SEARCHES = "searches.jsonl"
_WORD = re.compile(r"\w+")


def remember(
    root: Path, words: Sequence[str], domain: str, hits: int, at_unix_ms: int, best: float | None = None
) -> None:
    """Append one search. A search by example without a domain goes under `(by example)`: texts are not kept."""
    name = domain or " ".join(word.lower() for word in _WORD.findall(" ".join(words))) or "(by example)"
    line = json.dumps({"at": at_unix_ms, "domain": name[:80], "hits": hits, "best": best}, sort_keys=True)
    with (root / SEARCHES).open("a") as file:
        file.write(line + "\n")


def recall(root: Path) -> Iterator[Search]:
    """Yield every search so far; a line that was cut short by a crash is left out."""
    path = root / SEARCHES
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            entry = parse_json(line)
            yield Search(str(entry["domain"]), int(entry["hits"]), entry["best"])
        except (ValueError, KeyError, TypeError):
            continue
