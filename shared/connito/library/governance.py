"""Visibility, licence, data sources and credit of experts.

A record says these things under `governance` (`visibility`, `organisation`, `owner`, `sources`) and `license`. A record
that says nothing is public, made from the one training corpus whose digest it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from connito.errors import Invalid
from connito.library.schema import Described, Governance
from connito.v1 import reasons_pb2

VISIBILITIES = ("public", "organisation", "private")


@dataclass(frozen=True)
class Viewer:
    """Whoever asks. Without a name only what is public is visible."""

    name: str = ""
    organisations: frozenset[str] = frozenset()
    # The operator of an installation, who sees what anybody may see.
    everything: bool = False

    def sees(self, record: Described) -> bool:
        """Return whether an expert is public, of the viewer's organisation, or the viewer's own."""
        rules = governance(record)
        if self.everything or rules["visibility"] == "public" or (self.name and rules["owner"] == self.name):
            return True
        return rules["visibility"] == "organisation" and rules["organisation"] in self.organisations


def governance(record: Described) -> Governance:
    """Return `visibility`, `organisation`, `owner` and `sources` of a record, defaults filled in. `Invalid` for
    nonsense.
    """
    given = record.get("governance", Governance())
    training = record.get("training_data", "")
    rules: Governance = {
        "visibility": given.get("visibility", "public"),
        "organisation": given.get("organisation", ""),
        "owner": given.get("owner", record.get("customer", "")),
        "sources": list(given.get("sources", [training] if training else [])),
    }
    if rules["visibility"] not in VISIBILITIES:
        raise Invalid(f"unknown visibility {rules['visibility']!r}: use {', '.join(VISIBILITIES)}")
    if rules["visibility"] == "organisation" and not rules["organisation"]:
        raise Invalid("an expert that is visible to an organisation must name it: add governance.organisation")
    return rules


@dataclass(frozen=True)
class Terms:
    """The terms of a licence. `share_alike` binds derivatives of the expert to the same licence."""

    commercial: bool = True
    derivatives: bool = True
    redistribution: bool = True
    attribution: bool = True
    share_alike: bool = False


# How SPDX writes that several licences hold together.
_JOINED = " AND "
# By SPDX identifier. Not a lawyer's reading: the terms that a program can hold people to.
TERMS: dict[str, Terms] = {
    "CC0-1.0": Terms(attribution=False),
    "Unlicense": Terms(attribution=False),
    "MIT": Terms(),
    "BSD-3-Clause": Terms(),
    "Apache-2.0": Terms(),
    "PSF-2.0": Terms(),
    "CC-BY-4.0": Terms(),
    "CC-BY-SA-4.0": Terms(share_alike=True),
    "GPL-3.0-only": Terms(share_alike=True),
    "CC-BY-NC-4.0": Terms(commercial=False),
    "CC-BY-NC-SA-4.0": Terms(commercial=False, share_alike=True),
    "CC-BY-ND-4.0": Terms(derivatives=False),
    "CC-BY-NC-ND-4.0": Terms(commercial=False, derivatives=False),
    "LicenseRef-internal": Terms(redistribution=False),
}


def terms_of(licence: str) -> Terms | None:
    """Return the terms of a licence, or of several that hold together (`A AND B`); None where one is not in the table."""
    parts = [TERMS.get(name) for name in licence.split(_JOINED)]
    known = [terms for terms in parts if terms is not None]
    if len(known) < len(parts):
        return None
    return Terms(
        commercial=all(terms.commercial for terms in known),
        derivatives=all(terms.derivatives for terms in known),
        redistribution=all(terms.redistribution for terms in known),
        attribution=any(terms.attribution for terms in known),
        share_alike=any(terms.share_alike for terms in known),
    )


@dataclass(frozen=True)
class Use:
    """An intended use. `accepted` are licence texts outside the table that the user has read and accepts."""

    verb: str = "export"
    commercial: bool = False
    redistribute: bool = False
    accepted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Permission:
    """A use that is allowed, and what it obliges to."""

    license: str
    attribution: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standing:
    """The status of an expert in the library: `status` is good, deprecated, yanked or opted-out."""

    status: str = "good"
    reason: str = ""

    @property
    def withdrawn(self) -> bool:
        """Return whether it is not to be used any more."""
        return self.status in ("yanked", "opted-out")

    def __str__(self) -> str:
        return self.status if self.status == "good" else f"{self.status}: {self.reason}"


def check_use(
    records: Sequence[Described],
    use: Use,
    *,
    standings: Mapping[str, Standing] | None = None,
    viewer: Viewer | None = None,
    allow_yanked: bool = False,
) -> Permission:
    """Return whether `viewer` may `use` these experts together; compositions are derivatives of every one of them.

    Raises `Invalid` (NOT_PERMITTED) naming the expert, the term and the way out. An expert that is not visible is
    reported as one that does not exist would be. Deprecated experts pass with a warning, yanked ones only when allowed.
    """
    warnings: list[str] = []
    for record in records:
        name = str(record["expert_id"])
        if not (viewer or Viewer()).sees(record):
            raise _refused(f"there is no expert {name!r} that you may see")
        warnings += _standing(name, (standings or {}).get(name, Standing()), allow_yanked)
        _terms_allow(name, str(record.get("license", "")), use)
    licence = _joint_licence(records, use)
    credited = tuple(
        f"{record['expert_id']} ({record.get('license') or 'no licence stated'})"
        for record in records
        if (terms_of(str(record.get("license", ""))) or Terms()).attribution
    )
    return Permission(licence, credited, tuple(warnings))


def _standing(name: str, standing: Standing, allow_yanked: bool) -> list[str]:
    if standing.status == "opted-out":
        raise _refused(f"{name} was made from data whose owner has opted out ({standing.reason}); use another expert")
    if standing.status == "yanked" and not allow_yanked:
        raise _refused(f"{name} was yanked: {standing.reason}; use another expert, or insist with --allow-yanked")
    return [f"{name} is {standing.status}: {standing.reason}"] if standing.status in ("deprecated", "yanked") else []


def _terms_allow(name: str, licence: str, use: Use) -> None:
    terms = terms_of(licence)
    if terms is None:
        if licence in use.accepted:
            return
        said = f"the licence {licence!r}, which is not in the table" if licence else "no licence"
        raise _refused(f"{name} has {said}: read its terms and pass --accept-license {licence!r}")
    if use.commercial and not terms.commercial:
        raise _refused(f"{name} is {licence}: no commercial use; leave it out")
    if use.redistribute and not terms.redistribution:
        raise _refused(f"{name} is {licence}: it may not be passed on; leave it out or keep the result private")
    if use.verb in DERIVING and not terms.derivatives:
        raise _refused(f"{name} is {licence}: no derivatives, and {use.verb} makes one; use it unchanged")


# Verbs whose result is another expert than the one that was put in.
DERIVING = ("compose", "prune", "extract")


def _joint_licence(records: Sequence[Described], use: Use) -> str:
    """Return the licence of what is made of all of them: the share-alike one if there is one, else all of them,
    joined.
    """
    licences = sorted({name for record in records for name in str(record.get("license", "")).split(_JOINED)})
    binding = [name for name in licences if TERMS.get(name, Terms()).share_alike]
    if len(licences) == 1 or use.verb not in DERIVING:
        return _JOINED.join(licences)
    if len(binding) > 1:
        raise _refused(f"{' and '.join(binding)} each demand that the result carries them: these cannot be composed")
    if binding:
        limits = [n for n in licences if n != binding[0] and not TERMS.get(n, Terms()).commercial]
        if limits and TERMS[binding[0]].commercial:
            raise _refused(f"{binding[0]} forbids the further limits of {limits[0]}: these cannot be composed")
        return binding[0]
    return _JOINED.join(licences)


def _refused(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_NOT_PERMITTED)


Lookup = Callable[[str], Described | None]


@dataclass
class Attribution:
    """Whole units by miner, and what could not be credited to anyone."""

    units: dict[str, int] = field(default_factory=dict)
    uncredited: int = 0


def attribute(record: Described, units: int, lookup: Lookup) -> Attribution:
    """Split `units` of use over the people behind an expert, through its parents to the miners. Conserved to the unit.

    A composition passes each parent's weight on; `lookup` finds a parent's record by expert id. Parents that are not
    found, and experts that nobody was paid for, leave their part uncredited.
    """
    shares: dict[str, float] = {}
    _collect(record, 1.0, lookup, shares, frozenset())
    names = sorted(shares)
    whole = [math.floor(shares[name] * units) for name in names]
    rest = units - sum(whole)
    order = sorted(range(len(names)), key=lambda i: (whole[i] - shares[names[i]] * units, names[i]))
    for index in order[:rest]:
        whole[index] += 1
    credited = dict(zip(names, whole, strict=True))
    lost = credited.pop("", 0)
    return Attribution({name: count for name, count in credited.items() if count}, lost)


def _collect(
    record: Described | None, share: float, lookup: Lookup, shares: dict[str, float], seen: frozenset[str]
) -> None:
    parents = [] if record is None else record.get("derived", {}).get("parents", [])
    if record is not None and parents and record["expert_id"] not in seen:
        weights = [abs(float(parent.get("weight", 1.0))) for parent in parents]
        total = math.fsum(weights)
        even = [weight / total if total > 0 else 1 / len(parents) for weight in weights]
        for parent, part in zip(parents, even, strict=True):
            _collect(lookup(parent["expert_id"]), share * part, lookup, shares, seen | {record["expert_id"]})
        return
    people = [] if record is None else [row for row in record.get("contributors", []) if row.get("share", 0) > 0]
    paid = math.fsum(row["share"] for row in people)
    for row in people:
        shares[row["miner"]] = shares.get(row["miner"], 0.0) + share * row["share"] / paid
    if not people:
        shares[""] = shares.get("", 0.0) + share
