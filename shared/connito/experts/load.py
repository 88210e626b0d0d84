"""Putting a library expert into a Hugging Face model, and proving that only its tensors changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from connito.data.documents import parse_json
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.library.artifact import EXPERT_FILE, RECORD_FILE, ExpertHeader, read_header
from connito.v1 import reasons_pb2 as reasons

if TYPE_CHECKING:
    from torch import nn

    from connito.moe.rows import BaseDigests
    from connito.moe.state import TargetState


@dataclass
class LoadedExpert:
    """An expert that is in `model` now. `changed` are the tensors, and rows of tensors, that differ from the base."""

    model: nn.Module
    header: ExpertHeader
    changed: list[str]
    _base_rows: TargetState = field(repr=False)
    _before: Mapping[str, str] = field(repr=False)

    def remove(self) -> None:
        """Put the base's rows back. Raises `VerificationFailed` unless the model is the base again, bit for bit."""
        from connito.moe.rows import fingerprint, write_rows

        write_rows(self.model, self.header.layers, self._base_rows)
        after = fingerprint(self.model)
        odd = sorted(name for name in self._before.keys() | after.keys() if self._before.get(name) != after.get(name))
        if odd:
            raise VerificationFailed(
                f"{len(odd)} tensors are not the base's after removing the expert, first {odd[0]}: something else "
                "changed the model since; load the base again",
                reason=reasons.REASON_DIGEST_MISMATCH,
            )


def load_expert(model: nn.Module, expert: Path | str) -> LoadedExpert:
    """Put the expert at `expert` (a file, or the directory of an export) into `model`, in place; it may be compiled, or lie
    on several devices.

    Every tensor of the model, and every expert's row separately, is hashed before and after. Raises `NotFound` when
    there is no such file, `Invalid` when the model is not the base the expert was made for (nothing is written
    then), and `VerificationFailed` when the file is not what its record says or when anything but the expert's own rows
    changed (the rows are put back first).
    """
    from connito.moe.rows import assert_only_changed, base_digests, fingerprint, read_rows, write_rows
    from connito.moe.state import load_state

    path = _file(Path(expert))
    header = read_header(path)
    # What torch.compile returns wraps the model, and says its names with a prefix.
    model = getattr(model, "_orig_mod", model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise Invalid(
            "parts of this model are on disk, not in memory: load it where all of it fits (without an offload folder), put "
            "the expert in, and save it",
            reason=reasons.REASON_WRONG_TENSORS,
        )
    state = load_state(path)
    before = fingerprint(model)
    base_rows = read_rows(model, header.layers)
    check_base(header, base_digests(model, header.layers, before))
    _check_dtypes(state, base_rows)
    write_rows(model, header.layers, state)
    try:
        changed = assert_only_changed(before, model, header.layers)
    except VerificationFailed:
        write_rows(model, header.layers, base_rows)
        raise
    return LoadedExpert(model, header, changed, base_rows, before)


def check_base(header: ExpertHeader, actual: BaseDigests) -> None:
    """Raise `Invalid` unless the model is, tensor for tensor, the base that the expert was trained on."""
    if header.base_fingerprint and header.base_fingerprint != actual.rest:
        raise Invalid(
            f"this model is not {header.base_name}, the base of the expert: tensors outside the expert's rows differ. "
            "Load the base as it was published, in its own dtype, and remove other experts first",
            reason=reasons.REASON_STALE_BASE,
        )
    if header.base_rows and header.base_rows != actual.rows:
        raise Invalid(
            f"the rows that this expert replaces are not those of {header.base_name}: another expert is probably loaded "
            "there; remove it first",
            reason=reasons.REASON_STALE_BASE,
        )


def _file(expert: Path) -> Path:
    """Return the expert file, checked against the record beside it if there is one."""
    path = expert / EXPERT_FILE if expert.is_dir() else expert
    if not path.is_file():
        raise NotFound(f"there is no expert at {path}; get one with `connito library export`")
    record = path.with_name(RECORD_FILE)
    if expert.is_dir() and record.is_file():
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            claimed = parse_json(record.read_text())["expert"]["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise Invalid(f"{record} is not the record of an expert: {error!r}; export the expert again") from error
        if actual != claimed:
            raise VerificationFailed(
                f"{path} has digest {actual[:12]}…, its record says {str(claimed)[:12]}…; export the expert again",
                reason=reasons.REASON_DIGEST_MISMATCH,
            )
    return path


def _check_dtypes(state: TargetState, base_rows: TargetState) -> None:
    for name, rows in state.items():
        if name in base_rows and rows.dtype != base_rows[name].dtype:
            raise Invalid(
                f"{name} is {rows.dtype} in the expert and {base_rows[name].dtype} in the model: writing would round it; "
                "load the model in the expert's dtype",
                reason=reasons.REASON_WRONG_DTYPE,
            )
