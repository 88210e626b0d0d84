"""The library's index, as tests compare it."""

from __future__ import annotations

from typing import Any

from connito.library.index import Index
from connito.library.schema import ExpertRecord

COLUMNS = {
    "experts JOIN records USING (id)": "expert_id, origin, sequence, deposited_at, saving, record",
    "notices": "*",
    "sources": "*",
    "opt_outs": "*",
    "uses": "*",
    "words": "*",
}


def expert_record(expert_id: str, domain: str) -> ExpertRecord:
    """Return a record with every field that a reader may rely on."""
    return {
        "format": "connito-record/1",
        "expert_id": expert_id,
        "domain": domain,
        "version": 1,
        "parents": [],
        "run": "run-1",
        "created": "2031-01-01T00:00:00.000+00:00",
        "base": {"name": "smol", "manifest": "b" * 64},
        "expert": {"digest": "e" * 64, "bytes": 1200, "parameters": 300},
        "model_parameters": 1000,
        "selection": {
            "method": "esft-token",
            "threshold": 0.2,
            "layers": {"2": [1]},
            "selected": 1,
            "total": 8,
            "report": "",
        },
        "losses": [{"domain": domain, "before": 3.0, "after": 2.5, "tokens": 10}],
        "lineage": [],
        "contributors": [],
        "license": "CC-BY-4.0",
        "data_statement": "",
        "customer": "",
        "training_data": "",
    }


def contents(index: Index) -> dict[str, list[tuple[Any, ...]]]:
    """Return everything the index holds, in an order of its own: two indexes of one log are equal."""
    return {table: sorted(index.select(f"SELECT {names} FROM {table}"), key=repr) for table, names in COLUMNS.items()}
