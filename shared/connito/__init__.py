"""Connito: improve open Mixture-of-Experts language models by pieces.

What is offered here is imported when it is first used, so that `import connito` needs neither torch nor time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connito.client import Client as Client
    from connito.expert import load_expert as load_expert
    from connito.moe.resident import compress as compress
    from connito.moe.selection import select as select

__version__ = "0.1.0"

_WHERE = {
    "Client": "connito.client",
    "compress": "connito.moe.resident",
    "load_expert": "connito.expert",
    "select": "connito.moe.selection",
}

__all__ = ["__version__", *_WHERE]  # noqa: PLE0604 - names of the table below resolve through __getattr__


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'connito' has no attribute {name!r}")
