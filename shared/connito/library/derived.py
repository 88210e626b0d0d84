"""Records of what is made from library experts: compositions, prunings, extractions. Lineage goes through `derived`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from connito.errors import Invalid
from connito.library.artifact import MODEL_FORMAT, ExpertHeader
from connito.library.governance import VISIBILITIES, governance
from connito.library.record import RECORD_FORMAT, expert_id, no_part
from connito.library.schema import (
    Base,
    Contributor,
    Derived,
    ExpertFile,
    ExpertRecord,
    Governance,
    Loss,
    Parent,
    Selection,
)
from connito.library.signature import joint_signature

if TYPE_CHECKING:
    from connito.data.manifest import Manifest

Weighted = Sequence[tuple[ExpertRecord, float]]


def base_of(manifest: Manifest, parents: Sequence[ExpertRecord] = ()) -> Base:
    """Return what a record says of a base; where it is that of its `parents`, what theirs say of it."""
    for parent in parents:
        if manifest.is_known_as(parent["base"]["name"], parent["base"]["manifest"]):
            return parent["base"]
    base: Base = {"name": manifest.name, "manifest": manifest.digest}
    if manifest.quantised:
        base["quantised"] = manifest.quantised
    return base


def derived_record(
    verb: str,
    header: ExpertHeader,
    parents: Weighted,
    *,
    digest: str,
    size: int,
    parameters: int,
    created: str,
    license: str,  # noqa: A002 - the record's word
    settings: Mapping[str, Any],
    losses: Sequence[Loss] = (),
) -> ExpertRecord:
    """Return the record of an expert file that `verb` made of `parents`, each with the weight it went in with.

    `created`: ISO time. `settings`: what the verb needs to be repeated. The result is as private as its most private
    parent, carries every parent's data sources, and credits the parents' contributors by weight. Raises `Invalid`
    without parents, or when these are of different bases or of private owners that differ.
    """
    records = [record for record, _ in parents]
    if not records or len({record["base"]["manifest"] for record in records}) != 1:
        raise Invalid(f"{verb} needs experts of one base; these are of {sorted({r['base']['name'] for r in records})}")
    first = records[0]
    return _made_of(parents, {
        "format": RECORD_FORMAT,
        "expert_id": expert_id(header.domain, digest),
        "domain": header.domain,
        "created": created,
        "base": first["base"],
        "expert": {"digest": digest, "bytes": size, "parameters": parameters},
        "model_parameters": first["model_parameters"],
        "selection": _selection(verb, header.layers, first["selection"]["total"]),
        "losses": list(losses),
        "license": license,
        "derived": _derived(verb, settings, parents),
    })  # fmt: skip


def model_record(
    verb: str,
    domain: str,
    base: Base,
    parents: Sequence[ExpertRecord],
    *,
    digest: str,
    size: int,
    parameters: int,
    keep: Mapping[int, Sequence[int]],
    total: int,
    created: str,
    license: str,  # noqa: A002 - the record's word
    settings: Mapping[str, Any],
    losses: Sequence[Loss],
) -> ExpertRecord:
    """Return the part of an exported model's record that experts' records have too, so that the library can find both.

    `digest`, `size`, `parameters` are of the model file; `total`: routed experts of the base. `parents`: the experts that
    were in the base before; without any, nobody is credited and the model is public. Raises `Invalid` for private owners
    that differ.
    """
    even = [(parent, 1.0) for parent in parents]
    return _made_of(even, {
        "format": MODEL_FORMAT,
        "expert_id": expert_id(f"{domain or 'model'}-{verb}", digest),
        "domain": domain,
        "created": created,
        "base": base,
        "expert": {"digest": digest, "bytes": size, "parameters": parameters},
        "model_parameters": parameters,
        "selection": _selection(verb, keep, total or sum(map(len, keep.values()))),
        "losses": list(losses),
        "license": license,
        "derived": _derived(verb, settings, even),
    })  # fmt: skip


class _Made(TypedDict):
    """The fields of a record that depend on what was made; the rest follows from the parents."""

    format: str
    expert_id: str
    domain: str
    created: str
    base: Base
    expert: ExpertFile
    model_parameters: int
    selection: Selection
    losses: list[Loss]
    license: str
    derived: Derived


def _made_of(parents: Weighted, made: _Made) -> ExpertRecord:
    records = [record for record, _ in parents]
    return {
        "format": made["format"],
        "expert_id": made["expert_id"],
        "domain": made["domain"],
        "created": made["created"],
        "base": made["base"],
        "expert": made["expert"],
        "model_parameters": made["model_parameters"],
        "selection": made["selection"],
        "losses": made["losses"],
        "license": made["license"],
        "derived": made["derived"],
        "version": 0,
        "parents": [record["expert_id"] for record in records],
        "run": "",
        "lineage": [],
        "contributors": joint_contributors(parents),
        "data_statement": " / ".join(sorted({r["data_statement"] for r in records if r.get("data_statement")})),
        "customer": "",
        "training_data": "",
        "signature": joint_signature([(record.get("signature"), weight) for record, weight in parents]),
        "governance": joint_governance(records) if records else {},
    }


def _selection(verb: str, layers: Mapping[int, Sequence[int]], total: int) -> Selection:
    return {
        "method": verb,
        "threshold": 0.0,
        "layers": {str(layer): list(experts) for layer, experts in sorted(layers.items())},
        "selected": sum(map(len, layers.values())),
        "total": total,
        "report": "",
    }


def _derived(verb: str, settings: Mapping[str, Any], parents: Weighted) -> Derived:
    named: list[Parent] = [
        {"expert_id": record["expert_id"], "digest": record["expert"]["digest"], "weight": weight}
        for record, weight in parents
    ]
    return {"verb": verb, "settings": dict(settings), "parents": named}


def joint_governance(records: Sequence[ExpertRecord]) -> Governance:
    """Return the strictest visibility among them and the union of their sources."""
    rules = [governance(record) for record in records]
    strictest = max(rules, key=lambda rule: VISIBILITIES.index(rule["visibility"]))
    closed = {
        (rule["visibility"], rule["organisation"] if rule["visibility"] == "organisation" else rule["owner"])
        for rule in rules
        if rule["visibility"] == strictest["visibility"] != "public"
    }
    if len(closed) > 1:
        raise Invalid(
            f"these experts are {strictest['visibility']} to different people ({', '.join(sorted(who for _, who in closed))}): "
            "what is made of them could be shown to none of them; ask an owner to publish one"
        )
    return {**strictest, "sources": sorted({source for rule in rules for source in rule["sources"]})}


def joint_contributors(parents: Weighted) -> list[Contributor]:
    """Return the contributors of all parents, shares weighted by |weight|, best first. Parents' rewards are not paid again."""
    total = math.fsum(abs(weight) for _, weight in parents)
    table: dict[str, Contributor] = {}
    for record, weight in parents:
        part = abs(weight) / total if total > 0 else 1 / len(parents)
        for row in record.get("contributors", []):
            known = table.setdefault(row["miner"], no_part(row["miner"], row["label"]))
            known["share"] += part * row["share"]
            known["merged"] += row["merged"]
    return sorted(table.values(), key=lambda row: (-row["share"], row["miner"]))
