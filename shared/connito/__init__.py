"""Connito: improve open Mixture-of-Experts language models by pieces.

What is offered here is imported when it is first used, so that `import connito` needs neither torch nor time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connito.client import Client as Client
    from connito.expert import load_expert as load_expert
    from connito.moe.arrow import variants as variants
    from connito.moe.branches import import_branches as import_branches
    from connito.moe.compose import Composition as Composition
    from connito.moe.compose import read_part as read_part
    from connito.moe.extraction import extract as extract
    from connito.moe.flex import opt_in as opt_in
    from connito.moe.flex import opt_out as opt_out
    from connito.moe.resident import compress as compress
    from connito.moe.selection import select as select
    from connito.moe.upgrade import upgrade as upgrade

__version__ = "0.1.0"

_WHERE = {
    "Client": "connito.client",
    "Composition": "connito.moe.compose",
    "compress": "connito.moe.resident",
    "extract": "connito.moe.extraction",
    "import_branches": "connito.moe.branches",
    "load_expert": "connito.expert",
    "opt_in": "connito.moe.flex",
    "opt_out": "connito.moe.flex",
    "read_part": "connito.moe.compose",
    "select": "connito.moe.selection",
    "upgrade": "connito.moe.upgrade",
    "variants": "connito.moe.arrow",
}

__all__ = ["__version__", *_WHERE]  # noqa: PLE0604 - names of the table below resolve through __getattr__


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'connito' has no attribute {name!r}")
