"""Which keys speak for which role. The operator's file; every reader checks each fact against it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from connito.errors import Invalid
from connito.identity import is_public_key

ROLES = ("coordinator", "selector", "committer", "aggregator", "library", "validator", "customer")


@dataclass(frozen=True)
class Roster:
    """`keys[role]` are the public keys of a role; `stakes[validator]` weighs its vote (default 1)."""

    keys: dict[str, frozenset[str]] = field(default_factory=dict)
    stakes: dict[str, float] = field(default_factory=dict)

    def permits(self, role: str, signer: str) -> bool:
        """Whether `signer` may speak as `role`."""
        return signer in self.keys.get(role, frozenset())

    def stake(self, validator: str) -> float:
        """The weight of a validator's vote; 0 for a key that is not a validator's."""
        return self.stakes.get(validator, 1.0) if self.permits("validator", validator) else 0.0

    @classmethod
    def load(cls, path: Path) -> Roster:
        """Read `{"keys": {role: [public key]}, "stakes": {public key: number}}`. Raises `Invalid` naming what is wrong."""
        try:
            raw = json.loads(path.read_text())
            keys = {str(role): frozenset(map(str, members)) for role, members in raw["keys"].items()}
            stakes = {str(key): float(value) for key, value in raw.get("stakes", {}).items()}
        except OSError as error:
            raise Invalid(
                f"cannot read the roster {path}: {error.strerror}; set CONNITO_ROSTER to the operator's file"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Invalid(
                f"the roster {path} is not of the form {{'keys': {{role: [public keys]}}}}: {error!r}"
            ) from error
        for role, members in keys.items():
            if role not in ROLES:
                raise Invalid(f"the roster {path} names an unknown role {role!r}; known: {', '.join(ROLES)}")
            for key in members:
                if not is_public_key(key):
                    raise Invalid(f"the roster {path} holds {key!r} under {role}, which is not a public nkey")
        if any(stake < 0 for stake in stakes.values()):
            raise Invalid(f"the roster {path} holds a negative stake")
        return cls(keys, stakes)

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        raw = {"keys": {role: sorted(members) for role, members in self.keys.items()}, "stakes": self.stakes}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
