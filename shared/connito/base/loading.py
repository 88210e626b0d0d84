"""Loading a base model without holding it twice: tensors are memory-mapped, so processes on one machine share pages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.base.stored import ReadRow, ReadTensor, Stored, locate
from connito.data.manifest import Manifest, Range, Reader, TensorEntry, checked
from connito.errors import Invalid, NotFound
from connito.moe.layout import as_targets, require_moe_layers
from connito.moe.residency import ALL, FOUR_BIT, HELPERS
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn

    from connito.moe.four_bit import FourBit
    from connito.moe.residency import Residents


def build_empty(config: Any, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a causal language model of `config` whose parameters *are* `tensors`: nothing is initialised and nothing
    copied.

    Raises `Invalid` naming the first tensor that is missing, surplus or of another shape.
    """
    model = build_meta(config)
    assign(model, tensors)
    return model


def build_meta(config: Any) -> nn.Module:
    """Return the model's modules with parameters on the meta device and real buffers (rotary tables). In eval mode,
    frozen.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), _parameters_on_meta():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.eval()
    model.requires_grad_(False)
    return model


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the model's meta parameters by `tensors`, then tie what the configuration ties."""
    try:
        missing, surplus = model.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as error:
        raise Invalid(
            f"the checkpoint does not fit its configuration: {error}", reason=reasons_pb2.REASON_WRONG_SHAPE
        ) from error
    model.tie_weights()  # type: ignore[operator]
    model.requires_grad_(False)
    absent = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if absent or surplus:
        name = (absent or sorted(surplus))[0]
        what = "is missing from" if absent else "does not belong in"
        raise Invalid(
            f"{name} {what} the checkpoint ({len(absent)} missing, {len(surplus)} surplus): it was saved for another "
            "architecture than its config.json names",
            reason=reasons_pb2.REASON_WRONG_TENSORS,
        )
    del missing


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Register parameters without storage inside the block; buffers keep theirs, since they cannot be recomputed."""
    import torch
    from torch import nn

    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        with torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def load_full(source: Path | Mapping[str, Path], *, device: torch.device | None = None) -> nn.Module:
    """Return the whole model from a checkpoint directory, or from its files by name (`config.json`,
    `model.safetensors`, …).

    On the CPU, tensors are memory-mapped copy-on-write: several processes share the page cache, and writing expert rows
    copies only the pages written. A checkpoint that stores its experts singly cannot be mapped and is converted.
    """
    files = files_of(source)
    config = load_config(files)
    model = build_meta(config)
    tensors = mapped_tensors(files)
    if _same_names(model, tensors):
        assign(model, tensors)
    else:
        model = _converted(files, config)
    return model if device is None else model.to(device)


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
) -> nn.Module:
    """Return `compress(load_full(…))` without ever holding the full model, or fetching what is not kept of it.

    Reads the shared tensors, and of each adapted layer only the rows of targets and helpers, through `reader`; every
    range is checked against the manifest. Fused and one by one, in one file or many: see `connito.base.stored`. Raises
    `VerificationFailed` for wrong bytes, `Invalid` for a base that lacks a tensor.

    half: matrices that stay frozen are held in bfloat16, routers excepted, each cast as it arrives; train under autocast.
    residency: with `four-bit` every frozen expert is packed as it arrives, one at a time (`connito.moe.residency`).
    """
    config = config_from_json(manifest_file(manifest, reader, "config.json"))

    def tensor(name: str) -> torch.Tensor:
        return _tensor(manifest.read(reader, name), manifest.tensors[name])

    def row(name: str, expert: int) -> torch.Tensor:
        part = manifest.row(name, expert)
        return _tensor(manifest.read_range(reader, part), part)

    return _resident(
        config,
        _Source(manifest.tensors, tensor, row),
        selection,
        helpers or {},
        _TrainingSetup(routing_mode, top_k, half, residency),
    )


def load_resident_local(
    source: Path | Mapping[str, Path],
    selection: Any,
    helpers: Mapping[int, Iterable[int]] | None = None,
    routing_mode: str = "natural",
    *,
    top_k: int = 0,
    half: bool = False,
    residency: str = HELPERS,
) -> nn.Module:
    """Return `load_resident` from files on this machine: shared tensors are memory-mapped, target and helper rows
    copied.

    Of experts that are stored one by one, those of a layer that is not adapted are copied too, being fused.
    """
    files = files_of(source)
    tensors = mapped_tensors(files)

    def row(name: str, expert: int) -> torch.Tensor:
        return tensors[name][expert]

    return _resident(
        load_config(files),
        _Source(tensors, tensors.__getitem__, row),
        selection,
        helpers or {},
        _TrainingSetup(routing_mode, top_k, half, residency),
    )


@dataclass(frozen=True)
class _Source:
    """A checkpoint: its tensors' names, and how to read one tensor or one expert's row of one."""

    names: Iterable[str]
    read: ReadTensor
    read_row: ReadRow


@dataclass(frozen=True)
class _TrainingSetup:
    """Settings of the training model."""

    routing_mode: str
    top_k: int
    half: bool
    residency: str

    def held(self, tensor: torch.Tensor, *, router: bool = False) -> torch.Tensor:
        """Return a frozen tensor as it is kept. Routers stay exact: another rounding would choose other experts."""
        import torch

        if not self.half or router or tensor.dim() < 2 or tensor.dtype not in (torch.float32, torch.float64):
            return tensor
        return tensor.to(torch.bfloat16)


def _resident(
    config: Any, source: _Source, selection: Any, helpers: Mapping[int, Iterable[int]], how: _TrainingSetup
) -> nn.Module:
    from connito.moe.resident import install, resident_plan

    model = build_meta(config)
    layers = require_moe_layers(model)
    plan = resident_plan(layers, as_targets(selection), helpers, how.routing_mode, how.residency)
    stored = locate(model, source.names)
    routers = {f"{layer.router_name}." for layer in layers.values()}
    for index, residents in plan.items():
        experts, name_of = layers[index].experts, f"{layers[index].experts_name}.{{}}".format
        banks = {
            name: _rows(_found(stored, name_of(name)), getattr(experts, name), residents, source, how)
            for name in layers[index].parameters
        }
        install(layers[index], residents, banks, how.routing_mode, how.top_k)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    whole = {
        name: how.held(_found(stored, name).whole(source.read), router=name.startswith(tuple(routers)))
        for name, tensor in model.state_dict().items()
        if tensor.is_meta and (name in stored or name not in tied)
    }
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assign(model, whole)
    for name in trainable:
        model.get_parameter(name).requires_grad_(True)
    return model


def _rows(
    stored: Stored, bank: torch.Tensor, residents: Residents, source: _Source, how: _TrainingSetup
) -> tuple[torch.Tensor, torch.Tensor | FourBit]:
    """Return (target rows, frozen rows) of one tensor of a bank, which itself has no storage yet."""
    import torch

    from connito.moe.four_bit import hold

    def pick(experts: Sequence[int]) -> torch.Tensor:
        if not experts:
            return torch.empty(0, *bank.shape[1:], dtype=bank.dtype)
        return stored.rows(experts, source.read, source.read_row).to(bank.dtype)

    if how.residency == ALL:
        whole = stored.whole(source.read).to(bank.dtype)
        return whole[list(residents.targets)], how.held(whole)
    if how.residency == FOUR_BIT:
        one_by_one = (pick([expert])[0] for expert in residents.helpers)
        dtype = how.held(bank).dtype
        return pick(residents.targets), hold(one_by_one, len(residents.helpers), bank.shape[1:], dtype)
    return pick(residents.targets), how.held(pick(residents.helpers))


def _found(stored: Mapping[str, Stored], name: str) -> Stored:
    if name not in stored:
        raise Invalid(
            f"the base has no tensor {name}: it was saved for another architecture than its config.json names, or a file "
            "of it is missing; build or import it again",
            reason=reasons_pb2.REASON_WRONG_TENSORS,
        )
    return stored[name]


def _tensor(data: bytes, entry: TensorEntry | Range) -> torch.Tensor:
    import torch

    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    if entry.dtype not in dtypes:
        raise Invalid(
            f"tensors of type {entry.dtype} are not supported; convert the base to F32 or BF16",
            reason=reasons_pb2.REASON_WRONG_DTYPE,
        )
    if not data:
        return torch.empty(entry.shape, dtype=dtypes[entry.dtype])
    return torch.frombuffer(bytearray(data), dtype=dtypes[entry.dtype]).view(entry.shape)


def files_of(source: Path | Mapping[str, Path]) -> dict[str, Path]:
    """Return files by name. Raises `NotFound` when there is no config.json or no safetensors among them."""
    if isinstance(source, Path):
        files = {path.name: path for path in source.iterdir() if path.is_file()} if source.is_dir() else {}
    else:
        files = dict(source)
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise NotFound(
            f"{source if isinstance(source, Path) else sorted(files)} is not a checkpoint: it needs config.json and "
            ".safetensors files; make one with `connito base build`"
        )
    return files


def load_config(files: Mapping[str, Path]) -> Any:
    """Return the configuration from config.json. Raises `Invalid` for a family that transformers does not know."""
    return config_from_json(files["config.json"].read_bytes())


def config_from_json(data: bytes) -> Any:
    """Return the same from its bytes. On the CPU experts run in the family's own loop: batched products are far slower
    there.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = json.loads(data)
    family = values.get("model_type")
    if family not in CONFIG_MAPPING:
        raise Invalid(
            f"the model family {family!r} is not part of the installed transformers", reason=reasons_pb2.REASON_BAD_SPEC
        )
    config = CONFIG_MAPPING[family].from_dict(values)
    config._experts_implementation = "eager"
    return config


def manifest_file(manifest: Manifest, reader: Reader, name: str) -> bytes:
    """Return a small file of the base, checked. Raises `NotFound` when the base has none of that name."""
    if name not in manifest.files:
        raise NotFound(f"the base has no {name}; build or import it again")
    entry = manifest.files[name]
    return checked(reader(entry, 0, entry.size), entry.digest, name)


def load_tokenizer(source: Path | Mapping[str, Path]) -> Any:
    """Return the tokenizer of a checkpoint directory, or of its files by name."""
    from transformers import AutoTokenizer

    if isinstance(source, Path):
        if not source.is_dir():
            raise NotFound(
                f"{source} is not a folder; give the folder of a base model, as `connito base build` makes it"
            )
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in source.items():
            if not name.endswith(".safetensors"):
                (Path(folder) / name).symlink_to(path.resolve())
        return AutoTokenizer.from_pretrained(folder)


def mapped_tensors(files: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint by name, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(files):
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(files[name], framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise Invalid(f"{files[name]} is damaged: {error}", reason=reasons_pb2.REASON_BAD_HEADER) from error
    return tensors


def _same_names(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names = set(model.state_dict())
    return names - tied <= set(tensors) <= names


def _converted(files: Mapping[str, Path], config: Any) -> nn.Module:
    """Let transformers rename and fuse what the checkpoint stores otherwise."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            (Path(folder) / name).symlink_to(path.resolve())
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=config.dtype, experts_implementation="eager"
        )
    model.eval()
    return model.requires_grad_(False)
