"""One description of a checkpoint, which the manifest, every loader, `--rewrite`, `fits` and the upload are made from.

It is found out from config.json and the headers alone: transformers loads the checkpoint once without storage, and what
comes out says which stored tensors it takes, in which types, what it ties, what is missing and what is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.base.dequantise import Packed, unpacked
from connito.base.pickled import pickled_headers
from connito.base.pretrained import in_types, lacking, modules_of, on_meta, parse_config
from connito.base.quantised import FP8, Quantised, unpacked_headers
from connito.base.stored import Source, Stored, format_name, locate, torch_dtypes
from connito.data.checkpoint_files import CheckpointFiles, Header, find_checkpoint, read_headers, read_json
from connito.data.hashing import hash_checkpoint
from connito.data.manifest import Bank, Manifest, Taken, usual_bank
from connito.errors import Invalid
from connito.moe.layout import MoELayer, require_moe_layers
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Description:
    """A checkpoint as its model takes it.

    `skeleton`: the model on the meta device, each tensor in the type it is loaded in; `tensors`: sources by the model's names;
    `packed`: weights that are stored as values and scales, which stand here as one tensor of numbers; `quantised`: how, for
    people; `kept`: types of tensors, by the model's names, that stay as they are stored whatever the model's type is.
    """

    config: Any
    dtype: torch.dtype
    skeleton: nn.Module
    tensors: Mapping[str, Stored]
    packed: Mapping[str, Packed]
    quantised: str
    headers: Mapping[str, Header]
    kept: Mapping[str, torch.dtype] = field(default_factory=dict)

    @cached_property
    def layers(self) -> dict[int, MoELayer]:
        """Return the MoE layers of the model. Raises `Invalid` for a dense one."""
        return require_moe_layers(self.skeleton)

    @property
    def vocabulary(self) -> int:
        """Return how many tokens the model has embeddings of."""
        return int(self.skeleton.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    def names(self) -> list[str]:
        """Return the stored names of all tensors that the model takes."""
        return [name for stored in self.tensors.values() for name in stored.names]

    def rowwise(self, layer: MoELayer) -> bool:
        """Return whether single experts of a layer can be read without the others."""
        return all(self._bank(layer, part)[1] for part in layer.parameters)

    def banks(self) -> dict[str, Bank]:
        """Return, by stored name, which experts of which layer the tensors with routed experts hold."""
        out: dict[str, Bank] = {}
        for index, layer in self.layers.items():
            for part in layer.parameters:
                stored, rowwise = self._bank(layer, part)
                if not rowwise:
                    continue
                for names in stored.sources.values():
                    for expert, name in enumerate(names):
                        usual = usual_bank(name)
                        single = Bank(index, usual.part if usual else part, expert)
                        out[name] = single if stored.by_expert else Bank(index, part)
        return out

    def picker(self, layer: MoELayer, part: str, source: Source) -> Callable[[Sequence[int]], torch.Tensor]:
        """Return how to read rows [experts, …] of one bank of a layer that is `rowwise`, as they are when it is loaded."""
        stored, bank = self.tensors[f"{layer.experts_name}.{part}"], getattr(layer.experts, part)
        return lambda experts: stored.rows(experts, source, self.skeleton, bank.dtype)

    def plan(self) -> Any:
        """Return a configuration for `connito.workloads.rehearsal`: with the type that weights are loaded in, and whether experts
        are published in four bits. No model is made of it that is saved.
        """
        config = deepcopy(self.config)
        config.dtype = self.dtype
        config.published_four_bit = any(weight.four_bit for weight in self.packed.values())
        return config

    def published(
        self, layer: MoELayer, part: str, source: Source
    ) -> Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]] | None:
        """Return how to read rows of a bank as blocks and scales, where it is stored in four bits; else None."""
        stored = self.tensors[f"{layer.experts_name}.{part}"]
        weight = self.packed.get(stored.names[0])
        if stored.rule is not None or weight is None or not weight.four_bit:
            return None
        return lambda experts: (source.rows(weight.values, experts), source.rows(weight.scales, experts))

    def numbers(self, source: Source) -> Source:
        """Return a source of the tensors described here from one of the stored tensors."""
        dtypes = {name: torch_dtypes()[self.headers[name].dtype] for name in self.packed}
        return unpacked(source, self.packed, dtypes.__getitem__)

    def taken(self) -> Taken:
        """Return what of this a manifest keeps."""
        state, banks = self.skeleton.state_dict(), self.banks()
        taken = Taken({}, {}, "" if self.config.dtype else _dtype_name(self.dtype), quantised=self.quantised)
        for stored in self.tensors.values():
            for name in stored.names:
                packed = self.packed.get(name)
                for part in (packed.values, packed.scales) if packed else (name,):
                    taken.dtypes[part] = format_name(state[stored.name].dtype)
                    if name in banks:
                        usual = usual_bank(part) or banks[name]
                        taken.banks[part] = replace(banks[name], part=usual.part)
        return taken

    def _bank(self, layer: MoELayer, part: str) -> tuple[Stored, bool]:
        name = f"{layer.experts_name}.{part}"
        stored = self.tensors[name]
        return stored, stored.rowwise(self._meta, getattr(layer.experts, part), self.skeleton)

    @cached_property
    def _meta(self) -> dict[str, torch.Tensor]:
        return {name: meta(self.headers[name]) for name in self.names()}


def describe(config: bytes, headers: Mapping[str, Header], dtype: str = "") -> Description:
    """Return the description of a checkpoint from its config.json and the headers of its tensors.

    dtype: what is known of the model's type where config.json does not state it. Raises `Invalid` naming a tensor that is
    missing or of another shape, and for weights that are quantised in a way that is not read here.
    """
    parsed = parse_config(config)
    stored = unpacked_headers(parsed, headers)
    _check_types(stored.headers)
    whole = parsed.dtype or (_torch_dtype(dtype) if dtype else _first_dtype(headers))
    tensors = {name: meta(header) for name, header in stored.headers.items()}
    try:
        skeleton, missing = on_meta(parsed, tensors, dtype=whole)
    except Invalid as error:
        # The library says that a rule failed, not for which tensor.
        if isinstance(error.__cause__, RuntimeError):
            _check_rules(modules_of(parsed), stored.headers)
        raise error from error.__cause__
    if missing:
        raise lacking(missing)
    located = locate(skeleton, stored.headers)
    _check_experts(skeleton, located)
    _check_numbers(skeleton, located, stored.headers)
    kept = _kept(located, stored)
    in_types(skeleton, kept)
    used, state = {name for each in located.values() for name in each.names}, skeleton.state_dict()
    # Packed weights come out in the type that the model has them in, rounded once.
    types = {name: format_name(state[each.name].dtype) for each in located.values() for name in each.names}
    packed = {name: weight for name, weight in stored.packed.items() if name in used}
    numbers = {n: replace(h, dtype=types[n]) if n in packed else h for n, h in stored.headers.items()}
    return Description(parsed, whole, skeleton, located, packed, stored.kind, numbers, kept)


def describe_files(files: CheckpointFiles) -> Description:
    """Return the description of a checkpoint on this machine. Reads configuration and headers alone."""
    read_json(files.paths["config.json"], files.where)
    stated = files.stated.get("dtype", "")
    headers = pickled_headers(files) if files.pickled else read_headers(files)
    return describe(files.paths["config.json"].read_bytes(), headers, stated if isinstance(stated, str) else "")


def build_manifest(folder: Path, name: str = "", progress: Callable[[str, float], None] | None = None) -> Manifest:
    """Read a checkpoint's files once and describe them by content. Raises what `find_checkpoint` and `describe` raise, and
    `Invalid` for a dense model."""
    files = find_checkpoint(folder)
    if files.pickled:
        raise not_ranged(files)
    description = describe_files(files)
    return hash_checkpoint(files, description.taken(), name or folder.name, progress)


def not_ranged(files: CheckpointFiles) -> Invalid:
    """Return the error for weights of which no part can be read alone."""
    return Invalid(
        f"the weights of {files.where} are in {files.weights[0]}, PyTorch's own format, of which no part can be read alone: "
        f"write them once as safetensors, `connito base import {files.where} --rewrite OUT`",
        reason=reasons_pb2.REASON_WRONG_TENSORS,
    )


def meta(header: Header) -> torch.Tensor:
    """Return a tensor of this type and shape without storage."""
    import torch

    return torch.empty(header.shape, dtype=torch_dtypes()[header.dtype], device="meta")


def _check_types(headers: Mapping[str, Header]) -> None:
    """Raise `Invalid` for a tensor of a type that torch has no numbers for."""
    known = torch_dtypes()
    if odd := next((name for name, header in headers.items() if header.dtype not in known), None):
        raise Invalid(
            f"{odd} is of type {headers[odd].dtype}, in which no weights of a language model are read; save the model in F32, "
            "BF16 or F16",
            reason=reasons_pb2.REASON_WRONG_DTYPE,
        )


def _check_experts(skeleton: nn.Module, located: Mapping[str, Stored]) -> None:
    """Raise `Invalid` for an expert that is missing though the numbers add up: one beyond the last would take its place."""
    state = skeleton.state_dict()
    for name, stored in located.items():
        if absent := stored.absent(state[name]):
            raise lacking([f"expert {absent[0]} of {name}"])


def _check_rules(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """Raise `Invalid` naming the first tensor that the checkpoint's tensors do not make up."""
    tensors = {name: meta(header) for name, header in headers.items()}
    located = locate(model, headers)
    _check_experts(model, located)
    for stored in located.values():
        if stored.by_expert:
            whole = range(len(next(iter(stored.sources.values()))))
            stored.rows(whole, Source(tensors.__getitem__, lambda name, experts: tensors[name]), model, None)


def _kept(located: Mapping[str, Stored], stored: Quantised) -> dict[str, torch.dtype]:
    """Return the types of weights that a checkpoint in FP8 leaves as numbers: the library keeps them as they are stored."""
    import torch

    out: dict[str, torch.dtype] = {}
    for name, each in located.items() if stored.kind.startswith(FP8) else ():
        if all(source.endswith(".weight") and source not in stored.packed for source in each.names):
            out[name] = reduce(torch.promote_types, (torch_dtypes()[stored.headers[n].dtype] for n in each.names))
    return out


def _check_numbers(skeleton: nn.Module, located: Mapping[str, Stored], headers: Mapping[str, Header]) -> None:
    """Raise `Invalid` for whole numbers where the model has fractions: weights that were quantised, without a sign of how."""
    state = skeleton.state_dict()
    for name, stored in located.items():
        for source in stored.names if state[name].is_floating_point() else ():
            if not meta(headers[source]).is_floating_point():
                raise Invalid(
                    f"{source} is of type {headers[source].dtype}, where the model has {format_name(state[name].dtype)}: the "
                    "checkpoint is quantised; use the one that was not quantised, or convert it",
                    reason=reasons_pb2.REASON_WRONG_DTYPE,
                )


def _first_dtype(headers: Mapping[str, Header]) -> torch.dtype:
    """Return the type of the first tensor of floating numbers in the first file, as the library looks for it."""
    import torch

    first = min((header.file for header in headers.values()), default="")
    here = [torch_dtypes()[headers[name].dtype] for name in sorted(headers) if headers[name].file == first]
    return next((dtype for dtype in here if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise Invalid(
            f"{name[:40]!r} is no type of weights; fetch the checkpoint again", reason=reasons_pb2.REASON_BAD_SPEC
        )
    return found
