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
    "read_targets": "resident",
    "find_moe_layers": "layout",
    "fingerprint": "rows",
    "write_targets": "resident",
    "load_state": "state",
    "read_rows": "rows",
    "read_trace": "statistics",
    "save_state": "state",
    "select_experts": "selection",
    "train_local": "training",
    "write_rows": "rows",
}

__all__ = [*_HOMES]  # noqa: PLE0604 - names of the table above resolve through __getattr__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
