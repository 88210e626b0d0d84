"""Finding experts: by words, by domain, and ranked by the loss they would save on a few texts.

The last one needs a model and happens elsewhere (`connito.experts.predict`); here its candidates are chosen and its two
rankings, predicted and measured, are put side by side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from connito.library.governance import Standing, Viewer
from connito.library.index import Index
from connito.library.schema import Described

_WORD = re.compile(r"\w+", re.UNICODE)
# A hit in the domain outweighs one in the id, and that one the rest.
_WEIGHTS = (2.0, 5.0, 1.0)


@dataclass(frozen=True)
class Hit:
    """One expert that was found. `saving`: nats per token saved on its own domain; `score`: higher is better."""

    expert_id: str
    domain: str
    license: str
    saving: float | None
    score: float
    standing: Standing
    record: Described

    def to_json(self) -> dict[str, Any]:
        """Return the object that `library search --json` prints, without the record."""
        document = asdict(self)
        del document["record"], document["standing"]
        return {**document, "status": self.standing.status, "reason": self.standing.reason}


def search(
    index: Index,
    text: str = "",
    *,
    domain: str = "",
    base_digest: str = "",
    viewer: Viewer | None = None,
    everything: bool = False,
    limit: int = 20,
    offset: int = 0,
) -> list[Hit]:
    """Return experts whose record has all words of `text` (else any of them), best match first; without words, by
    saving.

    The last word may be the beginning of one. Only what `viewer` may see; yanked experts and those made from data that
    was opted out are left out unless `everything`. Deprecated ones come with their reason.
    """
    words = _WORD.findall(text)
    for joiner in (" AND ", " OR ") if len(words) > 1 else (" ",):
        match = joiner.join(_terms(words))
        hits = _query(index, match, domain, base_digest, viewer or Viewer(), everything, limit, offset)
        # A later page that is empty belongs to a search that had a first one: it has ended, and is not widened.
        if hits or (offset and _query(index, match, domain, base_digest, viewer or Viewer(), everything, 1, 0)):
            return hits
    return []


def visible(index: Index, viewer: Viewer, *, after: int = 0, limit: int = 50) -> list[tuple[int, str]]:
    """Return (sequence, expert id) of what `viewer` may see beyond the sequence `after`, oldest first, whatever its
    standing.
    """
    where, parameters = _conditions("", "", viewer, everything=True)
    sql = f"SELECT e.sequence, e.expert_id FROM experts e WHERE e.sequence > ? AND {where} ORDER BY e.sequence LIMIT ?"  # noqa: S608
    return [(int(row[0]), str(row[1])) for row in index.select(sql, (after, *parameters, limit))]


def _terms(words: Sequence[str]) -> list[str]:
    return [f'"{word}"' for word in words[:-1]] + [f'"{word}"*' for word in words[-1:]]


def _query(
    index: Index, match: str, domain: str, base_digest: str, viewer: Viewer, everything: bool, limit: int, offset: int
) -> list[Hit]:
    where, parameters = _conditions(domain, base_digest, viewer, everything)
    columns = "e.id, e.expert_id, e.domain, e.license, e.saving"
    if match:
        weights = ", ".join(map(str, _WEIGHTS))
        sql = (
            f"SELECT {columns}, -bm25(words, {weights}) AS score FROM words JOIN experts e ON e.id = words.rowid "  # noqa: S608
            f"WHERE words MATCH ? AND {where} ORDER BY score DESC, e.saving DESC, e.expert_id LIMIT ? OFFSET ?"
        )
        rows = index.select(sql, (match, *parameters, limit, offset))
    else:
        sql = f"SELECT {columns}, 0.0 FROM experts e WHERE {where} ORDER BY e.saving DESC, e.expert_id LIMIT ? OFFSET ?"  # noqa: S608
        rows = index.select(sql, (*parameters, limit, offset))
    # Records are long: only those that are shown are read.
    places = ", ".join("?" * len(rows))
    texts = dict(index.select(f"SELECT id, record FROM records WHERE id IN ({places})", [row[0] for row in rows]))  # noqa: S608
    return [
        Hit(name, area, licence, saved, score, index.standing(name), json.loads(texts[row]))
        for row, name, area, licence, saved, score in rows
    ]


def _conditions(domain: str, base_digest: str, viewer: Viewer, everything: bool) -> tuple[str, list[Any]]:
    clauses, parameters = ["1"], list[Any]()
    if domain:
        clauses.append("e.domain = ?")
        parameters.append(domain)
    if base_digest:
        clauses.append("e.base_digest = ?")
        parameters.append(base_digest)
    places = ", ".join("?" * len(viewer.organisations))
    seen = (
        "e.visibility = 'public' OR (e.owner = ? AND e.owner <> '') "
        f"OR (e.visibility = 'organisation' AND e.organisation IN ({places}))"
    )
    clauses.append(f"({seen})")
    parameters += [viewer.name, *sorted(viewer.organisations)]
    if not everything:
        clauses.append("e.expert_id NOT IN (SELECT expert_id FROM notices WHERE status = 'yanked')")
        clauses.append(
            "e.expert_id NOT IN (SELECT s.expert_id FROM opt_outs o CROSS JOIN sources s ON s.source = o.source "
            "WHERE o.standing = 1)"
        )
    return " AND ".join(clauses), parameters


@dataclass(frozen=True)
class Ranked:
    """An expert and what it saves on given texts, nats per token. `measured` None: predicted only."""

    expert_id: str
    domain: str
    predicted: float
    measured: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `library search --like --json` prints."""
        return asdict(self)


def rank(hits: Sequence[Hit], predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[Ranked]:
    """Return measured experts first, by what they save; then the rest by what they are predicted to."""
    rows = [
        Ranked(hit.expert_id, hit.domain, predicted[hit.expert_id], measured.get(hit.expert_id))
        for hit in hits
        if hit.expert_id in predicted
    ]
    return sorted(
        rows,
        key=lambda row: (
            row.measured is None,
            -(row.measured if row.measured is not None else row.predicted),
            row.expert_id,
        ),
    )
