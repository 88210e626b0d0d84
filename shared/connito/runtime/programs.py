"""Name the modules that services run as (docs/adr/0011-packaging.md)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

# The wheel carries the repository's `services/` under this name, so that it puts only `connito` on the path.
_PACKAGED = "connito._services"


@cache
def service_module(name: str) -> str:
    """Return what `python -m` runs service `name` as: in an installed package, or in a checkout."""
    return f"{_PACKAGED if find_spec(_PACKAGED) else 'services'}.{name}"
