"""Rights of each role in the artifact store: it reads the realms that its work is on, and writes what it makes.

Miners and customers hold no credentials: what they read and write, the committer signs for them, one object at a time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from connito.platform.session import BUCKET

_ADMIN = ("Admin", "Read", "Write", "List", "Tagging")
_PUBLIC, _ALL = ("public", "private"), ("public", "private", "holdout", "submissions")
# By role, the realms that it reads and those that it writes.
RIGHTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "coordinator": ((), ()),
    "selector": ((*_PUBLIC, "holdout"), _PUBLIC),
    # It writes nothing of its own; what it signs for others is allowed as far as it may do so itself.
    "committer": (_ALL, _ALL),
    "validator": (_ALL, ()),
    "aggregator": (_ALL, _PUBLIC),
    "library": (_PUBLIC, _PUBLIC),
    "console": (("public",), ()),
}


@dataclass(frozen=True)
class Holder:
    """Credentials in the store, and the role whose rights they open."""

    role: str
    access: str
    secret: str = field(repr=False)


def holders(access: str, secret: str, roles: Mapping[str, str]) -> dict[str, Holder]:
    """Return the operator, whose credentials are given, and by name those whose role has rights; theirs follow from it."""
    found = {"operator": Holder("operator", access, secret)}
    for name, role in sorted(roles.items()):
        if any(RIGHTS.get(role, ())):
            derived = hmac.new(secret.encode(), b"connito.v1.store\x00" + name.encode(), hashlib.sha256).hexdigest()
            found[name] = Holder(role, f"{access}-{name}", derived)
    return found


def identities(found: Mapping[str, Holder], bucket: str = BUCKET) -> list[dict[str, Any]]:
    """Return what the gateway is configured with."""
    return [
        {
            "name": name,
            "credentials": [{"accessKey": holder.access, "secretKey": holder.secret}],
            "actions": list(_ADMIN) if name == "operator" else _actions(holder.role, bucket),
        }
        for name, holder in found.items()
    ]


def _actions(role: str, bucket: str) -> list[str]:
    reads, writes = RIGHTS[role]
    return [f"Read:{bucket}/{realm}/*" for realm in reads] + [f"Write:{bucket}/{realm}/*" for realm in writes]
