"""Connito: improve open Mixture-of-Experts language models by pieces.

What is offered here is imported when it is first used, so that `import connito` needs neither torch nor time.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connito.base.branches import import_branches as import_branches
    from connito.client import Client as Client
    from connito.experts.arrow import variants as variants
    from connito.experts.compose import Composition as Composition
    from connito.experts.compose import read_part as read_part
    from connito.experts.extraction import extract_domain as extract_domain
    from connito.experts.flex import opt_in as opt_in
    from connito.experts.flex import opt_out as opt_out
    from connito.experts.load import load_expert as load_expert
    from connito.experts.replacement import replace_expert as replace_expert
    from connito.moe.resident import compress as compress
    from connito.moe.selection import select_experts as select_experts
    from connito.workloads.select_files import SelectOptions as SelectOptions
    from connito.workloads.select_files import select as select

__version__ = "0.1.0"

# A server is started by fork and exec. What gRPC would do in between, in a child without its threads, may abort the child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_WHERE = {
    "Client": "connito.client",
    "Composition": "connito.experts.compose",
    "SelectOptions": "connito.workloads.select_files",
    "compress": "connito.moe.resident",
    "extract_domain": "connito.experts.extraction",
    "import_branches": "connito.base.branches",
    "load_expert": "connito.experts.load",
    "opt_in": "connito.experts.flex",
    "opt_out": "connito.experts.flex",
    "read_part": "connito.experts.compose",
    "replace_expert": "connito.experts.replacement",
    "select": "connito.workloads.select_files",
    "select_experts": "connito.moe.selection",
    "variants": "connito.experts.arrow",
}

__all__ = ["__version__", *_WHERE]  # noqa: PLE0604 - names of the table below resolve through __getattr__
# Modules that the pages call by their names after `import connito` alone.
_MODULES = ("audit", "client", "errors", "library", "local")


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from connito.runtime.extras import extras_named

        with extras_named():
            return getattr(import_module(_WHERE[name]), name)
    if name in _MODULES:
        return import_module(f"connito.{name}")
    raise AttributeError(f"module 'connito' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names that are offered, for completion in a notebook."""
    return sorted([*__all__, *_MODULES])
