"""Composing library experts into a new library expert: file, record and card, and checking one from its parents.

The expert that comes out is an ordinary one: `connito.load_expert(model, folder)` puts it into the bare base.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid, VerificationFailed
from connito.experts.compose import Part, Recipe, Rows, base_rows, conflicts, layers_of, merge, read_part, state_of
from connito.experts.load import check_base
from connito.experts.measure import BaselineLosses, Texts
from connito.library.artifact import EXPERT_FILE, RECORD_FILE, ExpertHeader, require_new, tensor_sizes, write_expert
from connito.library.card import write_card
from connito.library.derived import derived_record
from connito.library.record import encode
from connito.library.schema import ExpertRecord, Loss, read_record
from connito.moe.rows import base_digests, fingerprint, write_rows
from connito.moe.state import save_state
from connito.runtime.progress import tell
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

Expert = tuple[Path, ExpertRecord]  # folder, record


@dataclass(frozen=True)
class Mixture:
    """Settings of a composition: weights by expert id (1 for all without them), and what the record says besides, as `extra`."""

    recipe: Recipe
    weights: Mapping[str, float] = field(default_factory=dict)
    verb: str = "compose"
    extra: Mapping[str, Any] = field(default_factory=dict)


def compose_experts(
    model: nn.Module,
    experts: Sequence[Expert],
    out: Path,
    mixture: Mixture,
    *,
    license: str,  # noqa: A002 - the record's word
    created: str,
    texts: Texts | None = None,
    trained: Rows | None = None,
) -> ExpertRecord:
    """Merge `experts` on the bare base `model` and write the result to the folder `out`.

    Returns its record; `derived.settings` holds recipe, conflicts and `extra`. `texts`, int32 [n, L + 1] by domain, are
    measured without and with the result. The same experts, recipe and weights give the
    same expert file, byte for byte. trained: rows in place of the merged ones.
    Raises `Invalid` for experts of another base than `model`, and a folder that is not empty.
    """
    require_new(out)
    parts, base = _read(model, experts)
    recipe, weights = mixture.recipe, mixture.weights
    chosen = {part.name: float(weights.get(part.name, 1.0)) for part in parts}
    if unknown := sorted(set(weights) - set(chosen)):
        raise Invalid(f"there is a weight for {unknown[0]}, which is not among the experts {', '.join(chosen)}")
    tell(f"merging {len(parts)} experts")
    rows = merge(parts, base, recipe, chosen) if trained is None else trained
    header = _header(model, parts, rows)
    losses = _measured(model, rows, base, texts or {})
    out.mkdir(parents=True, exist_ok=True)
    digest = _write(rows, header, out / EXPERT_FILE)
    record = derived_record(
        mixture.verb,
        header,
        [(record, chosen[part.name]) for part, (_, record) in zip(parts, experts, strict=True)],
        digest=digest,
        size=(out / EXPERT_FILE).stat().st_size,
        parameters=tensor_sizes(out / EXPERT_FILE)[0],
        created=created,
        license=license,
        settings={
            **asdict(recipe),
            "conflicts": [asdict(conflict) for conflict in conflicts(parts, base)],
            **mixture.extra,
        },
        losses=losses,
    )
    (out / RECORD_FILE).write_bytes(encode(record))
    write_card(record, out)
    return record


def _measured(model: nn.Module, rows: Rows, base: Rows, texts: Texts) -> list[Loss]:
    """Return losses by domain without and with `rows`; the model is the base again afterwards."""
    if not texts:
        return []
    before = BaselineLosses.of(model, texts)
    write_rows(model, layers_of(rows), state_of(rows))
    try:
        return before.compare(model)
    finally:
        write_rows(model, layers_of(rows), state_of({key: base[key] for key in rows}))


def verify_composition(model: nn.Module, folder: Path, parents: Sequence[Expert]) -> ExpertRecord:
    """Recompute a composed expert from its parents on the bare base `model`, offline; returns its record.

    Raises `VerificationFailed` when a parent is missing or another than the record names, or when the recomputed file
    is not this one, bit for bit.
    """
    record = read_record((folder / RECORD_FILE).read_bytes(), folder / RECORD_FILE)
    derived = record.get("derived", {})
    if derived.get("verb") not in ("compose", "upgrade"):
        raise Invalid(f"{record.get('expert_id')} is not a composition: there is nothing to recompute")
    parts, base = _read(model, parents)
    wanted = {parent["expert_id"]: parent for parent in derived["parents"]}
    given = {part.name: part.digest for part in parts}
    if given != {name: parent["digest"] for name, parent in wanted.items()}:
        raise VerificationFailed(
            f"the parents are {sorted(wanted)}; these are {sorted(given)}", reason=reasons_pb2.REASON_DIGEST_MISMATCH
        )
    settings = derived["settings"]
    recipe = Recipe(settings["method"], settings["density"], settings["scale"])
    rows = merge(parts, base, recipe, {name: parent["weight"] for name, parent in wanted.items()})
    with tempfile.TemporaryDirectory() as scratch:
        digest = _write(rows, _header(model, parts, rows), Path(scratch) / EXPERT_FILE)
    with (folder / EXPERT_FILE).open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest == actual == record["expert"]["digest"]:
        raise VerificationFailed(
            f"recomputed from its parents {record['expert_id']} has digest {digest[:12]}…, the file {actual[:12]}… and "
            f"the record {record['expert']['digest'][:12]}…",
            reason=reasons_pb2.REASON_DIGEST_MISMATCH,
        )
    return record


def _read(model: nn.Module, experts: Sequence[Expert]) -> tuple[list[Part], Rows]:
    """Return the parts, named by expert id, checked against the base and their records; and the base's rows."""
    digests = fingerprint(model)
    parts = []
    for folder, record in experts:
        part = read_part(folder)
        if part.digest != record["expert"]["digest"]:
            raise VerificationFailed(
                f"{folder} is not the expert that {record['expert_id']} describes; export it again",
                reason=reasons_pb2.REASON_DIGEST_MISMATCH,
            )
        assert part.header is not None
        check_base(part.header, base_digests(model, part.header.layers, digests))
        parts.append(Part(str(record["expert_id"]), part.digest, part.rows, part.header))
    return parts, base_rows(model, parts)


def _header(model: nn.Module, parts: Sequence[Part], rows: Rows) -> ExpertHeader:
    headers = [part.header for part in parts if part.header is not None]
    layers, first = layers_of(rows), headers[0]
    base = base_digests(model, layers)
    domain = "+".join(sorted({name for header in headers for name in header.domain.split("+")}))
    return ExpertHeader(domain, first.base_name, first.base_digest, layers, "", 0, base.rest, base.rows)


def _write(rows: Rows, header: ExpertHeader, path: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch) / "state.safetensors"
        save_state(state_of(rows), state)
        return write_expert(state, path, header)
