"""Roster of the keys of each role: the operator's file, against which every reader checks each fact."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from connito.errors import Invalid
from connito.files import write_durably
from connito.v1 import reasons_pb2
from connito.wire.identity import is_public_key

ROLES = ("coordinator", "selector", "committer", "aggregator", "library", "validator", "customer")
# Writes no facts; orders bans and invites, which a coordinator then writes down.
OPERATOR = "operator"
# What a member of an organisation may do: everything, submit runs as well, or see what is the organisation's.
OWNER, SUBMITTER, READER = "owner", "submitter", "reader"
DUTIES = (OWNER, SUBMITTER, READER)


@dataclass(frozen=True)
class Roster:
    """`keys[role]` are the public keys of a role; `stakes[validator]` weighs its vote (default 1).

    `retired[key]` is a key that spoke for a role until a moment (Unix ms, by the broker's clock): what it has written
    by then stays valid, or a rotated key would take its part of the log with it.
    """

    keys: dict[str, frozenset[str]] = field(default_factory=dict)
    stakes: dict[str, float] = field(default_factory=dict)
    retired: dict[str, tuple[str, int]] = field(default_factory=dict)
    # By name, the keys whose holders see what the library keeps to that organisation.
    organisations: dict[str, frozenset[str]] = field(default_factory=dict)
    # By organisation, what its members may do there; who is not named submits.
    duties: dict[str, dict[str, str]] = field(default_factory=dict)
    # By organisation, how many runs of its members may be under way at once; unlimited for one without a quota.
    quotas: dict[str, int] = field(default_factory=dict)
    # Public keys of those who sign miners' passes. Empty: whoever reaches an API may enrol.
    admits: set[str] = field(default_factory=set)

    def permits(self, role: str, signer: str) -> bool:
        """Return whether `signer` may speak as `role`."""
        return signer in self.keys.get(role, frozenset())

    def require(self, role: str, signer: str) -> None:
        """Raise `Invalid` (NOT_PERMITTED) unless `signer` may speak as `role`."""
        if not self.permits(role, signer):
            raise Invalid(
                f"{signer} is not a {role} in the operator's roster; ask the operator to add the key",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )

    def permitted(self, role: str, signer: str, time_unix_ms: int) -> bool:
        """Return whether `signer` might write as `role` when the broker stored its message."""
        was, until = self.retired.get(signer, ("", 0))
        return self.permits(role, signer) or (was == role and time_unix_ms <= until)

    def ever(self, role: str) -> set[str]:
        """Return the keys that speak for a role, or did until they were replaced."""
        return {*self.keys.get(role, ()), *(key for key, (was, _) in self.retired.items() if was == role)}

    def serves(self, signer: str) -> bool:
        """Return whether `signer` is a service's, a validator's or an operator's."""
        return any(role != "customer" and self.permits(role, signer) for role in (*ROLES, OPERATOR))

    def replace(self, other: Roster) -> None:
        """Become like `other`, for everybody who holds this one: the operator's file has changed."""
        pairs = (
            (self.keys, other.keys),
            (self.stakes, other.stakes),
            (self.retired, other.retired),
            (self.organisations, other.organisations),
            (self.duties, other.duties),
            (self.quotas, other.quotas),
            (self.admits, other.admits),
        )
        for mine, theirs in pairs:
            mine.clear()
            mine.update(theirs)  # type: ignore[arg-type]

    def memberships(self, signer: str) -> frozenset[str]:
        """Return the organisations that `signer` belongs to."""
        return frozenset(name for name, members in self.organisations.items() if signer in members)

    def duty(self, organisation: str, signer: str) -> str:
        """Return what `signer` may do in an organisation; empty for who is no member."""
        if signer not in self.organisations.get(organisation, frozenset()):
            return ""
        return self.duties.get(organisation, {}).get(signer, SUBMITTER)

    def only_reads(self, signer: str) -> bool:
        """Return whether `signer` is a reader of its organisation, who may change nothing."""
        return any(self.duty(name, signer) == READER for name in self.memberships(signer))

    def stake(self, validator: str) -> float:
        """Return the weight of a validator's vote; 0 for a key that is not a validator's."""
        spoke = self.permits("validator", validator) or self.retired.get(validator, ("",))[0] == "validator"
        return self.stakes.get(validator, 1.0) if spoke else 0.0

    @classmethod
    def load(cls, path: Path) -> Roster:
        """Read `{"keys": {role: [public key]}, "stakes": {public key: number}}`. Raises `Invalid` naming what is wrong."""
        try:
            raw = json.loads(path.read_text())
            keys = {str(role): frozenset(map(str, members)) for role, members in raw["keys"].items()}
            stakes = {str(key): float(value) for key, value in raw.get("stakes", {}).items()}
            retired = {str(k): (str(v["role"]), int(v["until_unix_ms"])) for k, v in raw.get("retired", {}).items()}
            organisations = {
                str(name): frozenset(map(str, members)) for name, members in raw.get("organisations", {}).items()
            }
            duties = {
                str(name): {str(key): str(duty) for key, duty in members.items()}
                for name, members in raw.get("organisation_duties", {}).items()
            }
            quotas = {str(name): int(runs) for name, runs in raw.get("organisation_quotas", {}).items()}
            admits = set(map(str, raw.get("admits", [])))
        except OSError as error:
            raise Invalid(
                f"cannot read the roster {path}: {error.strerror}; set CONNITO_ROSTER to the operator's file"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            unread = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError)
            why = "it is not JSON" if unread else "a field of it has another form"
            raise Invalid(f"{path} is no roster: {why}; set CONNITO_ROSTER to the operator's roster.json") from error
        for role, members in keys.items():
            if role not in (*ROLES, OPERATOR):
                raise Invalid(f"the roster {path} names an unknown role {role!r}; known: {', '.join(ROLES)}")
            for key in members:
                if not is_public_key(key):
                    raise Invalid(f"the roster {path} holds {key!r} under {role}, which is not a public nkey")
        if any(not 0 <= stake < math.inf for stake in stakes.values()):
            raise Invalid(f"the roster {path} holds a stake that is negative or no finite number")
        for key, (role, _) in retired.items():
            if role not in (*ROLES, OPERATOR) or not is_public_key(key):
                raise Invalid(f"the roster {path} retires {key!r} as {role!r}, which is no key or no role")
        _check_duties(path, organisations, duties, quotas)
        return cls(keys, stakes, retired, organisations, duties, quotas, admits)

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, self.to_json())

    def to_json(self) -> str:
        """Return the file's content."""
        raw: dict[str, object] = {
            "keys": {role: sorted(members) for role, members in self.keys.items()},
            "stakes": self.stakes,
        }
        if self.retired:
            raw["retired"] = {key: {"role": role, "until_unix_ms": at} for key, (role, at) in self.retired.items()}
        if self.organisations:
            raw["organisations"] = {name: sorted(members) for name, members in self.organisations.items()}
        if self.duties:
            raw["organisation_duties"] = self.duties
        if self.quotas:
            raw["organisation_quotas"] = self.quotas
        if self.admits:
            raw["admits"] = sorted(self.admits)
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"


def _check_duties(
    path: Path,
    organisations: dict[str, frozenset[str]],
    duties: dict[str, dict[str, str]],
    quotas: dict[str, int],
) -> None:
    """Raise `Invalid` for what would grant nothing or anything: a typing error must not open a door."""
    for name in (*duties, *quotas):
        if name not in organisations:
            raise Invalid(f"the roster {path} says what may be done in {name!r}, which is no organisation there")
    for name, members in duties.items():
        for key, duty in members.items():
            if duty not in DUTIES or key not in organisations[name]:
                raise Invalid(
                    f"the roster {path} makes {key!r} {duty!r} of {name!r}; duties are {', '.join(DUTIES)}, of members"
                )
    if any(runs < 0 for runs in quotas.values()):
        raise Invalid(f"the roster {path} holds a negative quota")
