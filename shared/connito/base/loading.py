"""Load a base model, whole or in the part that a miner trains, from its files or by byte ranges.

There is one loader: the checkpoint is described (`connito.base.description`), its tensors are read when their turn comes, and
transformers puts them into the model (`connito.base.pretrained`). Loaders differ in how a tensor is read and in which experts
are there. On the CPU tensors of files are memory-mapped copy-on-write, so that processes on one machine share pages.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.base.description import Description, describe, describe_files
from connito.base.pickled import pickled_tensors
from connito.base.pretrained import from_tensors, in_types, quiet
from connito.base.stored import Source, torch_dtypes
from connito.data.checkpoint_files import TOKENIZER_FILES, CheckpointFiles, find_checkpoint, read_json
from connito.data.manifest import FileEntry, Manifest, Range, Reader, TensorEntry, checked
from connito.errors import Invalid, NotFound
from connito.moe.device import moved
from connito.moe.layout import MoELayer, as_targets, check_routers
from connito.moe.residency import ALL, FOUR_BIT, HELPERS
from connito.runtime.progress import tell
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn

    from connito.moe.four_bit import FourBit
    from connito.moe.residency import Residents


class _Turn:
    """A tensor that is read when it is asked for its values."""

    def __init__(self, read: Callable[[], torch.Tensor], dtype: str) -> None:
        self._read, self._dtype = read, dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()

    def get_dtype(self) -> str:
        """Return the stored type, as the safetensors library names it."""
        return self._dtype


def build_empty(config: Any, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a causal language model of `config` whose parameters *are* `tensors`: nothing is initialised and nothing copied.

    Raises `Invalid` naming the first tensor that is missing or of another shape.
    """
    model: nn.Module = from_tensors(config, tensors, dtype=config.dtype)
    return model


def load_full(source: Path | Mapping[str, Path], *, device: torch.device | None = None) -> nn.Module:
    """Return the whole model from a checkpoint directory, or from its files by name (`config.json`, `model.safetensors`, …).

    What is stored in the model's own form and type is mapped: several processes share the page cache, and writing expert
    rows copies only the pages written. What is stored otherwise is converted.
    """
    tell("loading the model")
    files = find_checkpoint(source)
    description = describe_files(files)
    tensors = _turns(description, description.numbers(_mapped(files)))
    prepare = partial(in_types, types=description.kept)
    model: nn.Module = from_tensors(description.config, tensors, dtype=description.dtype, prepare=prepare)
    return model if device is None else moved(model, device)


def load_resident(
    manifest: Manifest,
    reader: Reader,
    selection: Any,
    helpers: Mapping[int, Iterable[int]] | None = None,
    routing_mode: str = "natural",
    *,
    top_k: int = 0,
    half: bool = False,
    residency: str = HELPERS,
    routers: str = "",
    state: Mapping[str, torch.Tensor] | None = None,
    ahead: Callable[[Sequence[tuple[FileEntry, int, int]]], None] | None = None,
) -> nn.Module:
    """Return `compress(load_full(…))` without ever holding the full model, or fetching what is not kept of it.

    Reads the shared tensors, and of each adapted layer only the rows of targets and helpers, through `reader`; every
    range is checked against the manifest. Where a family stores the experts of a layer so that one cannot be read alone, that
    layer is read whole. Raises `VerificationFailed` for wrong bytes, `Invalid` for a base that lacks a tensor.

    half: matrices that stay frozen are held in bfloat16, routers excepted, each cast as it arrives; train under autocast.
    residency: with `four-bit` every frozen expert is packed as it arrives, one at a time (`connito.moe.residency`).
    routers: digest of the base's routing, if known; a model that routes otherwise is refused (`Invalid`).
    state: the target rows to begin from, by state name. The base's own rows of targets are not read then, except in a layer
    that is read whole. Raises `Invalid` for a state of other names or shapes.
    ahead: is told all that `reader` will be asked for, before it is: (file, first byte, length).
    """
    from connito.moe.resident import write_targets

    config = manifest_file(manifest, reader, "config.json")
    description = describe(config, manifest.headers(), manifest.extra.get("dtype", ""))

    def tensor(name: str) -> torch.Tensor:
        return _tensor(manifest.read(reader, name), manifest.tensors[name])

    def rows(name: str, experts: Sequence[int]) -> torch.Tensor:
        import torch

        ranges = [manifest.row(name, expert) for expert in experts]
        return torch.stack([_tensor(manifest.read_range(reader, part), part) for part in ranges])

    given = state is not None
    how = _Training(as_targets(selection), helpers or {}, routing_mode, top_k, half, residency, routers, given)
    if ahead is not None:
        ahead(_asked(manifest, description, how))
    model = _resident(description, Source(tensor, rows), how)
    if state is not None:
        write_targets(model, state)
    return model


def load_resident_local(
    source: Path | Mapping[str, Path],
    selection: Any,
    helpers: Mapping[int, Iterable[int]] | None = None,
    routing_mode: str = "natural",
    *,
    top_k: int = 0,
    half: bool = False,
    residency: str = HELPERS,
    routers: str = "",
) -> nn.Module:
    """Return `load_resident` from files on this machine: shared tensors are memory-mapped, target and helper rows copied.

    Of experts that are stored one by one, those of a layer that is not adapted are copied too, being fused.
    """
    files = find_checkpoint(source)
    how = _Training(as_targets(selection), helpers or {}, routing_mode, top_k, half, residency, routers)
    return _resident(describe_files(files), _mapped(files), how)


@dataclass(frozen=True)
class _Training:
    """The part of a model that is trained, and settings of the training model. `given`: target rows come from elsewhere."""

    targets: Mapping[int, list[int]]
    helpers: Mapping[int, Iterable[int]]
    routing_mode: str
    top_k: int
    half: bool
    residency: str
    routers: str
    given: bool = False

    def held(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a frozen matrix as it is kept."""
        import torch

        wide = tensor.dim() > 1 and tensor.dtype in (torch.float32, torch.float64)
        return tensor.to(torch.bfloat16) if self.half and wide else tensor


def _plan(description: Description, how: _Training) -> tuple[dict[int, Residents], dict[int, MoELayer]]:
    """Return the experts that stay of each layer, and the layers of which no others are read."""
    from connito.moe.resident import resident_plan

    layers = description.layers
    plan = resident_plan(layers, how.targets, how.helpers, how.routing_mode, how.residency)
    return plan, {index: layers[index] for index in plan if description.rowwise(layers[index])}


def _asked(manifest: Manifest, description: Description, how: _Training) -> list[tuple[FileEntry, int, int]]:
    """Return the ranges that a loader reads, in about the order in which it does."""
    plan, apart = _plan(description, how)
    packed = (description.packed.get(name, name) for name in description.names())
    stored = [part for each in packed for part in ((each,) if isinstance(each, str) else (each.values, each.scales))]
    wanted: list[TensorEntry | Range] = [
        manifest.tensors[name] for name in dict.fromkeys(stored) if manifest.is_expert(name) not in apart
    ]
    for index in apart:
        for expert in sorted({*plan[index].helpers, *(() if how.given else plan[index].targets)}):
            wanted += manifest.expert_rows(index, expert)
    return [(manifest.files[part.file], part.start, part.length) for part in wanted]


def _resident(description: Description, source: Source, how: _Training) -> nn.Module:
    from connito.moe.resident import install

    layers, stored, source = description.layers, source, description.numbers(source)
    plan, apart = _plan(description, how)
    model: nn.Module = from_tensors(
        description.config,
        _turns(description, source, apart),
        dtype=description.dtype,
        prepare=lambda made: _shrink(made, description, apart, plan, how),
    )
    live = {index: _in(model, layer) for index, layer in layers.items()}
    check_routers(live, how.routers)
    for index, residents in plan.items():
        layer, banks = live[index], {}
        for part in layer.parameters:
            if index in apart:
                pick = description.picker(layers[index], part, source)
                published = description.published(layers[index], part, stored)
            else:
                pick, published = getattr(layer.experts, part).detach().__getitem__, None
            bank = getattr(layers[index].experts, part)
            if how.given and index in apart:
                pick = partial(_without_targets, pick, bank, residents)
            banks[part] = _rows(pick, published, bank, residents, how)
        install(layer, residents, banks, how.routing_mode, how.top_k)
    return model


def _in(model: nn.Module, layer: MoELayer) -> MoELayer:
    """Return a layer of the skeleton as it is in a model."""
    block = layer.experts_name.rpartition(".")[0]
    return replace(
        layer,
        experts=model.get_submodule(layer.experts_name),
        router=model.get_submodule(layer.router_name),
        block=model.get_submodule(block),
    )


def _without_targets(
    pick: Callable[[Sequence[int]], torch.Tensor], bank: torch.Tensor, residents: Residents, experts: Sequence[int]
) -> torch.Tensor:
    """Return rows of a bank of which those of targets are zeros that nobody read; one expert is in memory beside them."""
    if not set(experts) & set(residents.targets):
        return pick(experts)
    rows = bank.new_zeros(len(experts), *bank.shape[1:], device="cpu")
    for at, expert in enumerate(experts):
        if expert not in residents.targets:
            rows[at] = pick([expert])[0]
    return rows


def _rows(
    pick: Callable[[Sequence[int]], torch.Tensor],
    published: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]] | None,
    bank: torch.Tensor,
    residents: Residents,
    how: _Training,
) -> tuple[torch.Tensor, torch.Tensor | FourBit]:
    """Return (target rows, frozen rows) of one tensor of a bank, which itself has no storage."""
    from connito.moe.four_bit import PublishedFourBit, hold

    targets = pick(list(residents.targets)) if residents.targets else bank.new_empty(0, *bank.shape[1:], device="cpu")
    if how.residency == FOUR_BIT and published is not None and residents.helpers:
        return targets, PublishedFourBit(*published(residents.helpers), how.held(bank).dtype)
    if how.residency == FOUR_BIT:
        one_by_one = (pick([expert])[0] for expert in residents.helpers)
        return targets, hold(one_by_one, len(residents.helpers), bank.shape[1:], how.held(bank).dtype)
    beside = range(residents.num_experts) if how.residency == ALL else list(residents.helpers)
    return targets, how.held(pick(beside) if beside else bank.new_empty(0, *bank.shape[1:], device="cpu"))


def _shrink(
    model: nn.Module, description: Description, apart: Iterable[int], plan: Iterable[int], how: _Training
) -> None:
    """Give a model without storage no rows where experts are read apart, and frozen matrices the type they are held in."""
    import torch

    layers = description.layers
    in_types(model, description.kept)
    for index in apart:
        module = model.get_submodule(layers[index].experts_name)
        for part in layers[index].parameters:
            setattr(module, part, torch.nn.Parameter(getattr(module, part)[:0], requires_grad=False))
    # Routers stay exact: another rounding would choose other experts.
    exact = tuple(f"{layer.router_name}." for layer in layers.values())
    exact += tuple(f"{layers[index].experts_name}." for index in plan)
    for name, parameter in model.named_parameters():
        if not name.startswith(exact):
            parameter.data = how.held(parameter.data)


def _turns(description: Description, source: Source, apart: Mapping[int, MoELayer] | None = None) -> dict[str, Any]:
    """Return all that the model takes by its stored name, and banks without rows in place of those that are read apart."""
    import torch

    banks = {f"{layer.experts_name}.{part}" for layer in (apart or {}).values() for part in layer.parameters}
    whole = [stored for stored in description.tensors.values() if stored.name not in banks]
    out: dict[str, Any] = {
        name: _Turn(partial(source.read, name), description.headers[name].dtype)
        for stored in whole
        for name in stored.names
    }
    state = description.skeleton.state_dict()
    return out | {name: torch.empty(0, *state[name].shape[1:], dtype=state[name].dtype) for name in banks}


def _mapped(files: CheckpointFiles) -> Source:
    """Return how to read the tensors of files on this machine, each memory-mapped."""
    opened = [_opened(files.paths[name]) for name in files.weights if not files.pickled]
    pickled = pickled_tensors(files) if files.pickled else {}
    by_name = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = pickled[name] if files.pickled else by_name[name].get_tensor(name)
        return tensor

    def rows(name: str, experts: Sequence[int]) -> torch.Tensor:
        tensor = read(name)
        # A range of all of them is asked for by whoever changes none: it stays mapped.
        return tensor if experts == range(len(tensor)) else tensor[[*experts]]

    return Source(read, rows)


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Invalid(f"{path} is damaged: {error}", reason=reasons_pb2.REASON_BAD_HEADER) from error


def _tensor(data: bytes, entry: TensorEntry | Range) -> torch.Tensor:
    import torch

    dtype = torch_dtypes()[entry.dtype]
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(entry.shape)


def manifest_file(manifest: Manifest, reader: Reader, name: str) -> bytes:
    """Return a small file of the base, checked. Raises `NotFound` when the base has none of that name."""
    if name not in manifest.files:
        raise NotFound(f"the base has no {name}; build or import it again")
    entry = manifest.files[name]
    return checked(reader(entry, 0, entry.size), entry.digest, name)


def load_tokenizer(source: Path | Mapping[str, Path]) -> Any:
    """Return the tokenizer of a checkpoint directory, or of its files by name.

    Only the files of a tokenizer are looked at: code that lies beside them is never run. Raises `Invalid` with the remedy.
    """
    from transformers import AutoTokenizer

    if isinstance(source, Path) and not source.is_dir():
        raise NotFound(f"{source} is not a folder; give the folder of a base model, as `connito base build` makes it")
    there = {path.name: path for path in source.iterdir()} if isinstance(source, Path) else source
    with tempfile.TemporaryDirectory() as folder, quiet():
        for name in ("config.json", *TOKENIZER_FILES):
            if name in there:
                (Path(folder) / name).symlink_to(there[name].resolve())
        if "tokenizer.json" in there and "tokenizer_config.json" in there:
            _without_code(there["tokenizer_config.json"], Path(folder) / "tokenizer_config.json")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _without_code(settings: Path, out: Path) -> None:
    """Write a tokenizer's settings without the class that its own code would define: tokenizer.json says all it does."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    said = read_json(settings, str(settings.parent))
    code, kind = said.pop("auto_map", None), said.get("tokenizer_class")
    if code is None:
        return
    if not isinstance(kind, str) or tokenizer_class_from_name(kind) is None:
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    out.unlink()
    out.write_text(json.dumps(said))
