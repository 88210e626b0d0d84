"""Experts of a Mixture-of-Experts model: find, measure, select, train, judge and put back. torch loads on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Evaluator": "evaluate",
    "RoutingStatistics": "statistics",
    "Selection": "selection",
    "assert_only_changed": "rows",
    "choose_helpers": "selection",
    "collect": "statistics",
    "compress": "resident",
    "extract": "resident",
    "find_moe_layers": "layout",
    "fingerprint": "rows",
    "insert": "resident",
    "load_state": "state",
    "read_rows": "rows",
    "read_trace": "statistics",
    "save_state": "state",
    "select": "selection",
    "train_local": "training",
    "write_rows": "rows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
