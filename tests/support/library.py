"""The library's index, as tests compare it."""

from __future__ import annotations

from typing import Any

from connito.library.index import Index

COLUMNS = {
    "experts JOIN records USING (id)": "expert_id, origin, sequence, deposited_at, saving, record",
    "notices": "*",
    "sources": "*",
    "opt_outs": "*",
    "uses": "*",
    "words": "*",
}


def contents(index: Index) -> dict[str, list[tuple[Any, ...]]]:
    """Return everything the index holds, in an order of its own: two indexes of one log are equal."""
    return {table: sorted(index.select(f"SELECT {names} FROM {table}"), key=repr) for table, names in COLUMNS.items()}
