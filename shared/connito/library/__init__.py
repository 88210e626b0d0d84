"""The expert library: its formats, without torch, and the verbs of `connito library`, imported when first used.

`connito.library.compose(["a", "b"], base, out)` does what `connito library compose a b --base … --out …` does.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from connito.runtime.extras import extras_named

# The verbs stand above everything they use, in `connito.curation`; their names are offered where people look for them.
_HOMES = {
    "Agreement": "holdings",
    "BranchOptions": "growing",
    "ComposeOptions": "composing",
    "Deposited": "joining",
    "EvaluateOptions": "evaluating",
    "ExtractOptions": "shrinking",
    "GrowOptions": "growing",
    "Holdings": "holdings",
    "PruneOptions": "shrinking",
    "RouteOptions": "composing",
    "SearchOptions": "catalogue",
    "ShrinkSource": "shrinking",
    "UpgradeOptions": "composing",
    "branches": "growing",
    "cluster": "composing",
    "compose": "composing",
    "demand": "need",
    "deposit": "joining",
    "evaluate": "evaluating",
    "export": "exchange",
    "extract": "shrinking",
    "grow": "growing",
    "join": "growing",
    "ledger": "catalogue",
    "list": "catalogue",
    "mark": "catalogue",
    "prune": "shrinking",
    "pull": "hub",
    "push": "hub",
    "remove": "composing",
    "route": "composing",
    "search": "catalogue",
    "show": "catalogue",
    "skip": "shrinking",
    "steer": "shrinking",
    "upgrade": "composing",
    "verify": "exchange",
}

__all__ = [*_HOMES]  # noqa: PLE0604 - names of the table above resolve through __getattr__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras_named():
        home = importlib.import_module(f"connito.curation.{_HOMES[name]}")
    found = getattr(home, "list_" if name == "list" else name)
    # What it imports when it is called may be missing, too.
    offered = extras_named()(found) if inspect.isfunction(found) else found
    globals()[name] = offered
    return offered


def __dir__() -> list[str]:
    """Return the verbs, for completion in a notebook."""
    return sorted(__all__)
