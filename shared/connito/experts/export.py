"""Models made of library experts, pruned or extracted: ordinary checkpoints that stock transformers loads, with a record.

The folder holds config.json, model.safetensors, the tokenizer, and `record.json`, which names every file's digest, the
base, which of its experts are inside, and what was measured. It can be verified offline, with or without the base.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from connito.base.checkpoint import save_checkpoint
from connito.base.gguf_file import GGUF_FILE, save_gguf
from connito.base.hub_layout import copy_companions, save_hub
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.experts.prune import Keep, prune
from connito.library.artifact import MODEL_FILE, MODEL_FORMAT, RECORD_FILE, require_new, tensor_sizes
from connito.library.attestation import ATTESTATION_FILE
from connito.library.card import write_card
from connito.library.derived import model_record
from connito.library.record import encode
from connito.library.schema import Base, ExpertRecord, Loss, read_record
from connito.runtime.progress import tell
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

FORMAT = MODEL_FORMAT


@dataclass(frozen=True)
class ModelSource:
    """The origin of a model, for its record.

    base: `{"name", "manifest"}`, with `total` routed experts; keep: the base's expert ids inside, by layer, in the order
    of the rows (empty: dense); parents: records of experts that were put in before; losses: as `BaselineLosses.compare` measures.
    """

    verb: str
    base: Base
    keep: Keep = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    parents: Sequence[ExpertRecord] = ()
    license: str = ""
    losses: Sequence[Loss] = ()
    domain: str = ""
    total: int = 0
    created: str = ""


def export_model(
    model: nn.Module,
    out: Path,
    tokenizer: Any,
    source: ModelSource,
    extra: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    layout: str = "hf",
    beside: Path | None = None,
) -> ExpertRecord:
    """Write `model` and `extra` tensors by file name, to the new folder `out`; returns its record.

    layout: hf (experts fused, as transformers 5 has them), hf-hub (as the family was published) or gguf (for llama.cpp).

    beside: the base's folder, whose generation config, chat template and licence go along.
    The record is a library record: `library deposit` puts the folder on a shelf. Raises `Invalid` when layers differ in
    their number of experts or the folder is not empty.
    """
    require_new(out)
    tell(f"writing {out}")
    counts = {len(experts) for experts in source.keep.values()}
    if len(counts) > 1:
        raise Invalid(
            f"layers keep {sorted(counts)} experts, and this family stores one number: keep equally many in every layer",
            reason=reasons_pb2.REASON_WRONG_SHAPE,
        )
    file = _save(model, out, tokenizer, source, layout)
    if layout != "gguf" and (odd := _other_tensor(model, out)):
        shutil.rmtree(out)
        raise Invalid(
            f"transformers does not read {odd} back as it was written: this family is another model with so many experts; "
            "keep more of them",
            reason=reasons_pb2.REASON_WRONG_TENSORS,
        )
    if beside is not None:
        copy_companions(beside, out)
    for name, tensors in (extra or {}).items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / name)
    safe = file.name == MODEL_FILE
    count = tensor_sizes(file)[0] if safe else sum(parameter.numel() for parameter in model.parameters())
    record = model_record(
        source.verb, source.domain, source.base, source.parents, digest=_digest(file), size=file.stat().st_size,
        parameters=count, keep=source.keep, total=source.total, created=source.created,
        license=source.license, settings=source.settings, losses=source.losses,
    )  # fmt: skip
    write_card(record, out)
    record |= {
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "verb": source.verb,
        "experts": {str(index): list(experts) for index, experts in sorted(source.keep.items())},
        "settings": dict(source.settings),
        "measured": dict(source.measured),
        "files": {path.name: {"digest": _digest(path), "bytes": path.stat().st_size} for path in sorted(out.iterdir())},
    }
    (out / RECORD_FILE).write_bytes(encode(record))
    return record


def _save(model: nn.Module, out: Path, tokenizer: Any, source: ModelSource, layout: str) -> Path:
    """Write the model and what belongs to it; returns the file of its weights. Leaves nothing behind where it cannot."""
    try:
        if layout == "gguf":
            save_gguf(model, out, tokenizer, name=source.base["name"], license_name=source.license)
        else:
            (save_hub if layout == "hf-hub" else save_checkpoint)(model, out, tokenizer)
    except Invalid:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out / (GGUF_FILE if layout == "gguf" else MODEL_FILE)


def verify_export(folder: Path, base: Path | None = None) -> ExpertRecord:
    """Check an exported model offline; returns its record.

    Every file against its digest, and nothing in the folder that the record does not name. With the `base` folder, and
    where no expert was composed in and nothing was trained, also that every kept expert and every other tensor is the base's, bit
    for bit. Raises `NotFound` or `VerificationFailed`.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise NotFound(f"there is no {RECORD_FILE} in {folder}: it is not an export")
    record = read_record(path.read_bytes(), path)
    if record["format"] != FORMAT:
        raise VerificationFailed(f"{path} is not the record of a model, but {record['format']!r}")
    present = {file.name for file in folder.iterdir()} - {RECORD_FILE, ATTESTATION_FILE}
    if odd := sorted(present ^ set(record["files"])):
        raise VerificationFailed(f"{folder} and its record disagree about the file {odd[0]}; export it again")
    for name, entry in record["files"].items():
        if _digest(folder / name) != entry["digest"]:
            raise VerificationFailed(
                f"{folder / name} is not the file that was exported; export it again",
                reason=reasons_pb2.REASON_DIGEST_MISMATCH,
            )
    if base is not None and not record["parents"] and not record["settings"].get("tuned"):
        _compare_with_base(folder, base, record)
    return record


def verify_insertion(folder: Path, base: Path, experts: Sequence[Path]) -> None:
    """Check that a whole exported model is the base with these experts in it, tensor for tensor. Raises
    `VerificationFailed`, and `Invalid` where an expert is not of this base."""
    from connito.base.loading import load_full
    from connito.experts.load import load_expert

    model = load_full(base)
    for expert in experts:
        load_expert(model, expert)
    if odd := _other_tensor(model, folder):
        raise VerificationFailed(
            f"{odd} is neither the base's nor the expert's; export it again", reason=reasons_pb2.REASON_DIGEST_MISMATCH
        )


def _compare_with_base(folder: Path, base: Path, record: ExpertRecord) -> None:
    from connito.base.description import build_manifest
    from connito.base.loading import load_full

    if not build_manifest(base).is_known_as(record["base"]["name"], record["base"]["manifest"]):
        raise VerificationFailed(f"{base} is not the base {record['base']['name']} of this model")
    keep = {int(index): experts for index, experts in record["experts"].items()}
    if not keep:
        return
    if odd := _other_tensor(prune(load_full(base), keep), folder):
        raise VerificationFailed(f"{odd} is not the base's own", reason=reasons_pb2.REASON_DIGEST_MISMATCH)


def _other_tensor(model: nn.Module, folder: Path) -> str:
    """Return the first tensor that `model` and the checkpoint in `folder`, loaded, do not have alike; empty for none."""
    from connito.base.loading import load_full

    mine, made = model.state_dict(), load_full(folder).state_dict()
    odd = (name for name, tensor in mine.items() if name not in made or not torch.equal(made[name], tensor.to("cpu")))
    return next(odd, next(iter(made.keys() - mine.keys()), ""))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
