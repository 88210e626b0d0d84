"""Records of what is made from library experts: compositions, prunings, extractions. Lineage goes through `derived`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from connito.errors import Invalid
from connito.library.artifact import MODEL_FORMAT, ExpertHeader
from connito.library.governance import VISIBILITIES, governance
from connito.library.record import RECORD_FORMAT, expert_id
from connito.library.signature import joint_signature

Record = Mapping[str, Any]


def derived_record(
    verb: str,
    header: ExpertHeader,
    parents: Sequence[tuple[Record, float]],
    *,
    digest: str,
    size: int,
    parameters: int,
    created: str,
    license: str,  # noqa: A002 - the record's word
    settings: Mapping[str, Any],
    losses: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the record of an expert file that `verb` made of `parents`, each with the weight it went in with.

    `created`: ISO time. `settings`: what the verb needs to be repeated. The result is as private as its most private
    parent, carries every parent's data sources, and credits the parents' contributors by weight. Raises `Invalid`
    without parents, or when these are of different bases or of private owners that differ.
    """
    records = [record for record, _ in parents]
    if not records or len({record["base"]["manifest"] for record in records}) != 1:
        raise Invalid(f"{verb} needs experts of one base; these are of {sorted({r['base']['name'] for r in records})}")
    first = records[0]
    return {
        "format": RECORD_FORMAT,
        "expert_id": expert_id(header.domain, digest),
        "domain": header.domain,
        "version": 0,
        "parents": [str(record["expert_id"]) for record in records],
        "run": "",
        "created": created,
        "base": dict(first["base"]),
        "expert": {"digest": digest, "bytes": size, "parameters": parameters},
        "model_parameters": first["model_parameters"],
        "selection": {
            "method": verb,
            "threshold": 0.0,
            "layers": {str(layer): list(experts) for layer, experts in sorted(header.layers.items())},
            "selected": sum(map(len, header.layers.values())),
            "total": first["selection"]["total"],
            "report": "",
        },
        "losses": [dict(row) for row in losses],
        "lineage": [],
        "contributors": joint_contributors(parents),
        "license": license,
        "data_statement": " / ".join(sorted({str(r["data_statement"]) for r in records if r.get("data_statement")})),
        "customer": "",
        "training_data": "",
        "signature": joint_signature([(record.get("signature"), weight) for record, weight in parents]),
        "governance": joint_governance(records),
        "derived": {
            "verb": verb,
            "settings": dict(settings),
            "parents": [
                {"expert_id": record["expert_id"], "digest": record["expert"]["digest"], "weight": weight}
                for record, weight in parents
            ],
        },
    }


def model_record(
    verb: str,
    domain: str,
    base: Mapping[str, str],
    parents: Sequence[Record],
    *,
    digest: str,
    size: int,
    parameters: int,
    keep: Mapping[int, Sequence[int]],
    total: int,
    created: str,
    license: str,  # noqa: A002 - the record's word
    settings: Mapping[str, Any],
    losses: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the part of an exported model's record that experts' records have too, so that the library can find both.

    `digest`, `size`, `parameters` are of the model file; `total`: routed experts of the base. `parents`: the experts that
    were in the base before; without any, nobody is credited and the model is public. Raises `Invalid` for private owners
    that differ.
    """
    even = [(parent, 1.0) for parent in parents]
    return {
        "format": MODEL_FORMAT,
        "expert_id": expert_id(f"{domain or 'model'}-{verb}", digest),
        "domain": domain,
        "version": 0,
        "parents": [str(parent["expert_id"]) for parent in parents],
        "run": "",
        "created": created,
        "base": dict(base),
        "expert": {"digest": digest, "bytes": size, "parameters": parameters},
        "model_parameters": parameters,
        "selection": {
            "method": verb,
            "threshold": 0.0,
            "layers": {str(layer): list(experts) for layer, experts in sorted(keep.items())},
            "selected": sum(map(len, keep.values())),
            "total": total or sum(map(len, keep.values())),
            "report": "",
        },
        "losses": [dict(row) for row in losses],
        "lineage": [],
        "contributors": joint_contributors(even),
        "license": license,
        "data_statement": " / ".join(sorted({str(p["data_statement"]) for p in parents if p.get("data_statement")})),
        "customer": "",
        "training_data": "",
        "signature": joint_signature([(parent.get("signature"), 1.0) for parent in parents]),
        "governance": joint_governance(parents) if parents else {},
        "derived": {
            "verb": verb,
            "settings": dict(settings),
            "parents": [
                {"expert_id": parent["expert_id"], "digest": parent["expert"]["digest"], "weight": 1.0}
                for parent in parents
            ],
        },
    }


def joint_governance(records: Sequence[Record]) -> dict[str, Any]:
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


def joint_contributors(parents: Sequence[tuple[Record, float]]) -> list[dict[str, Any]]:
    """Return the contributors of all parents, shares weighted by |weight|, best first. Parents' rewards are not paid again."""
    total = math.fsum(abs(weight) for _, weight in parents)
    table: dict[str, dict[str, Any]] = {}
    for record, weight in parents:
        part = abs(weight) / total if total > 0 else 1 / len(parents)
        for row in record.get("contributors", []):
            known = table.setdefault(
                row["miner"],
                {"miner": row["miner"], "label": row["label"], "reward": 0, "merged": 0, "share": 0.0, "reasons": {}},
            )
            known["share"] += part * row["share"]
            known["merged"] += row["merged"]
    return sorted(table.values(), key=lambda row: (-row["share"], row["miner"]))
