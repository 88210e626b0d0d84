"""Prediction of a training model's memory from its configuration alone: the step itself, on tensors without memory.

The modules are built from the configuration, compressed as a miner compresses them, and trained for two steps by the
trainer's own code on torch's fake tensors, while `connito.moe.live_bytes` counts. So whatever a family computes and
whatever the trainer keeps is in the figure, and there is no formula to keep in step with them. What only data decide is
assumed: every resident expert of a layer gets the same number of tokens.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.data.packing import ROW, Rows
from connito.errors import Invalid
from connito.moe.adamw import AdamW
from connito.moe.footprint import Footprint, Workload
from connito.moe.four_bit import FourBit, PublishedFourBit
from connito.moe.layout import ROUTER_NAMES, as_targets, find_moe_layers, require_moe_layers
from connito.moe.live_bytes import LiveBytes
from connito.moe.prepare import decoder_halves, prepare
from connito.moe.residency import ALL, BACKGROUND, FOUR_BIT, HELPER, HELPERS, TARGET, Residents
from connito.moe.resident import add_background, install, resident_plan, target_parameters
from connito.moe.state import split_name, tensor_name
from connito.workloads.stand_ins import computable, stand_ins

if TYPE_CHECKING:
    from torch import nn

aten = torch.ops.aten
CPU = torch.device("cpu")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")
Experts = Mapping[int, Sequence[int]]


def rehearse(config: Any, targets: Experts, helpers: Experts, work: Workload) -> Footprint:
    """Return the footprint of training a model of `config` (transformers'). Takes seconds; nothing is loaded.

    Of many layers of one kind a few are rehearsed, each with as many targets as the layer that has most, and each further
    one adds what the last of them added. Raises `Invalid` for a selection of another base.
    """
    from connito.base.pretrained import modules_of

    model = modules_of(config)
    with torch.device("meta"):
        _compress(model, config, targets, helpers, work)
    few = _enough(config, model)
    if few is None:
        return rehearse_all(config, targets, helpers, work)
    widest = max(targets, key=lambda index: len(targets[index]))
    low, high = (
        _moments(
            _cut(config, layers),
            {index: targets[widest] for index in targets if index < layers},
            {index: helpers.get(widest, ()) for index in targets if index < layers},
            work,
        )
        for layers in few
    )
    sizes = [(len(targets[index]), index, tensor.numel(), tensor.nbytes) for index, tensor in _by_layer(model)]
    grown = [(size[2], size[3]) for size in sizes]
    there = [(size[2] / size[0], size[3] / size[0]) for size in sizes if size[1] < few[1]]
    share = sum(n for n, _ in grown) / (len(targets[widest]) * sum(n for n, _ in there))
    further = round(sum(b for _, b in grown) - len(targets[widest]) * sum(b for _, b in there))
    buffers = sum(tensor.nbytes for tensor in model.buffers() if tensor.dim() < 2)
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    more = (config.num_hidden_layers - few[1]) / (few[1] - few[0])
    kept = round(more * max(0, high[0].activations - low[0].activations))
    worked = round(more * max(0, high[0].workspace - low[0].workspace))
    found = []
    for moment in high:
        # Once there are gradients, a further layer has its own or still what it keeps for them.
        grows = moment is not high[0] and further > kept + worked
        found.append(
            Footprint(
                weights=sum(held.values()) - buffers,
                buffers=buffers,
                masters=round(moment.masters * share),
                gradients=moment.gradients + (further if grows or (len(high) == 1 and moment.gradients) else 0),
                moments=round(moment.moments * share),
                activations=moment.activations + (0 if grows else kept),
                workspace=moment.workspace + (0 if grows else worked),
            )
        )
    return max(found, key=lambda footprint: footprint.total)


def _enough(config: Any, model: nn.Module) -> tuple[int, int] | None:
    """Return two numbers of layers from whose footprints that of all follows, or None where all have to be rehearsed."""
    below, above = decoder_halves(model)
    kinds = [
        (getattr(config, "layer_types", None) or [""] * 10_000)[index : index + 1]
        + [any(_is_target(name) for name, _ in layer.named_parameters())]
        + [(name, tuple(tensor.shape)) for name, tensor in layer.named_parameters() if not _is_target(name)]
        for index, layer in enumerate((*below, *above))
    ]
    total = len(kinds)
    if total != getattr(config, "num_hidden_layers", 0):
        return None
    for period in range(1, 7):
        first = next((i for i in range(total) if kinds[i : total - period] == kinds[i + period :]), total)
        if first + 4 * period <= total:
            return first + 2 * period, first + 3 * period
    return None


def _is_target(name: str) -> bool:
    return name.rpartition(".")[2].startswith(TARGET)


def _by_layer(model: nn.Module) -> Iterator[tuple[int, torch.Tensor]]:
    return ((split_name(name)[0], parameter) for name, parameter in target_parameters(model).items())


def _cut(config: Any, layers: int) -> Any:
    """Return the configuration of the first `layers` of a model."""
    shorter, total = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == total and name != "architectures":
            setattr(shorter, name, value[:layers])
    shorter.num_hidden_layers = layers
    return shorter


def rehearse_all(config: Any, targets: Experts, helpers: Experts, work: Workload) -> Footprint:
    """Return the same with every layer rehearsed."""
    return max(_moments(config, targets, helpers, work), key=lambda footprint: footprint.total)


def _moments(config: Any, targets: Experts, helpers: Experts, work: Workload) -> list[Footprint]:
    """Return the footprints before a step's first gradient and from there on; one where a step has several passes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from connito.base.pretrained import modules_of
    from connito.moe.batches import HOME
    from connito.moe.training import train_local

    model = modules_of(config)
    model.set_experts_implementation("eager")
    engine = replace(work.engine, experts="grouped") if work.cuda and work.engine.experts == "auto" else work.engine
    with torch.device("meta"):
        _compress(model, config, targets, helpers, work)
        prepare(model, engine, torch.device("meta"))
    setattr(model, HOME, torch.device("cpu"))
    with computable(config.model_type), FakeTensorMode(allow_non_fake_inputs=True), stand_ins(cuda=work.cuda):
        _empty(model)
        # Further passes of a step are like the first one, beside the gradients so far.
        one = replace(work, sequences=work.micro_batch or work.sequences)
        counted = _Rehearsal(model, work)
        with counted:
            train_local(
                model,
                text(one),
                learning_rate=1e-3,
                bf16=work.bf16 or work.half,
                micro_batch=work.micro_batch,
                inner=work.inner,
                optimizer=work.engine.optimizer,
                on_step=counted.step_done,
            )
        found = [footprint_of(parts, model) for parts in counted.moments()]
    if one == work:
        return found
    gradients = sum(p.nbytes for p in target_parameters(model).values())
    return [replace(max(found, key=lambda footprint: footprint.total), gradients=gradients)]


def with_random_weights(
    config: Any, targets: Experts, helpers: Experts, work: Workload, device: torch.device
) -> nn.Module:
    """Return the training model that is rehearsed, for real, on `device`, one tensor after the other; for measurements alone.

    Without targets it is the whole model of transformers.
    """
    from connito.base.pretrained import modules_of

    model: nn.Module = modules_of(config)
    model.set_experts_implementation("eager")  # type: ignore[operator]
    if targets:
        _compress(model, config, targets, helpers, work)
    _empty(model, device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
    return prepare(model, work.engine, device) if targets else model


def config_of(base: Path) -> Any:
    """Return the configuration of a base, with the type that its weights are loaded in; where there are none, config.json is
    enough. Raises `NotFound` and `Invalid`.
    """
    from connito.base.description import describe_files
    from connito.base.pretrained import parse_config
    from connito.data.checkpoint_files import find_checkpoint

    there = {path.name for path in base.iterdir()} if base.is_dir() else set()
    if "config.json" not in there or any(name.endswith(WEIGHTS) for name in there):
        return describe_files(find_checkpoint(base)).plan()
    return parse_config((base / "config.json").read_bytes())


def same_everywhere(config: Any, number: int) -> dict[int, list[int]]:
    """Return a selection of `number` experts in every MoE layer. Raises `Invalid` where a layer has no more than that."""
    from connito.base.pretrained import modules_of

    layers = require_moe_layers(modules_of(config))
    fewest = min(layer.num_experts for layer in layers.values())
    if not 0 < number <= fewest:
        raise Invalid(
            f"{number} experts a layer cannot be trained: this model has {fewest}; give --experts 1 to {fewest}"
        )
    return {index: list(range(number)) for index in layers}


def text(work: Workload) -> Rows:
    """Return two steps of rows [2, sequences, length + 1] without words in them; `packed` ones hold two documents each."""
    rows = np.zeros((2, work.sequences, work.length + 1), ROW if work.packed else np.int32)
    if work.packed:
        place = np.arange(work.length + 1)
        rows["position"] = np.minimum(place, np.abs(place - (work.length + 1) // 2))
        rows["counts"] = rows["position"] > 0
    return rows


def footprint_of(counted: Mapping[str, int], model: nn.Module) -> Footprint:
    """Return parts that were counted, with the optimiser's bytes as what completes the rows to float32, and moments."""
    parts = dict(counted)
    kept = parts.pop("optimizer")
    from connito.moe.training import BETAS

    masters = AdamW(target_parameters(model), betas=BETAS).bytes()
    return Footprint(**parts, masters=masters, moments=kept - masters)


def _empty(model: nn.Module, device: torch.device = CPU) -> None:
    """Give parameters and buffers, on the meta device, a place on the processor; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = (
                        torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        if tensor.is_meta
                        else tensor.to(device)
                    )
                    if isinstance(tensor, torch.nn.Parameter):
                        made[id(tensor)] = torch.nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
                held[name] = made[id(tensor)]


def _compress(model: nn.Module, config: Any, targets: Experts, helpers: Experts, work: Workload) -> None:
    """Make the training model as the loader does, out of rows without memory."""
    layers = require_moe_layers(model)
    plan = resident_plan(layers, as_targets(targets), helpers, work.routing_mode, work.residency)
    published = getattr(config, "published_four_bit", False)
    merged: dict[str, torch.Tensor] = {}
    for index, residents in plan.items():
        banks = {name: getattr(layers[index].experts, name) for name in layers[index].parameters}
        install(
            layers[index],
            residents,
            {
                name: (_rows(bank, len(residents.targets)), _frozen(bank, residents, work, published))
                for name, bank in banks.items()
            },
            work.routing_mode,
            work.top_k,
        )
        merged |= {tensor_name(index, name): _rows(bank, 1) for name, bank in banks.items()}
    if work.background and work.residency == HELPERS:
        add_background(model, merged)
    packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FourBit))
    routers = tuple(f"{name}." for name, _ in model.named_modules() if name.rpartition(".")[2] in ROUTER_NAMES)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not (tensor.requires_grad or name.startswith((*packed, *routers))):
            tensor.data = _held(tensor.data, work)


def _frozen(bank: torch.Tensor, residents: Residents, work: Workload, published: bool) -> torch.Tensor | FourBit:
    if residents.residency == ALL:
        return bank.detach()
    shape, dtype = bank.shape[1:], _held(bank, work).dtype
    if residents.residency == FOUR_BIT and len(shape) > 1 and published and residents.helpers:
        scales = torch.empty(len(residents.helpers), shape[1], shape[0] // 32, dtype=torch.uint8)
        return PublishedFourBit(scales[..., None].expand(*scales.shape, 16).contiguous(), scales, dtype)
    if residents.residency == FOUR_BIT and len(shape) > 1:
        return FourBit(len(residents.helpers), shape, dtype)
    return _rows(bank, len(residents.helpers)).to(dtype)


def _rows(bank: torch.Tensor, number: int) -> torch.Tensor:
    return bank.new_empty((number, *bank.shape[1:]))


def _held(tensor: torch.Tensor, work: Workload) -> torch.Tensor:
    """Return a frozen tensor as the loader holds it."""
    return tensor.to(torch.bfloat16) if work.half and tensor.dim() > 1 and tensor.dtype == torch.float32 else tensor


class _Rehearsal(LiveBytes):  # type: ignore[no-untyped-call]
    """Counts, and answers what only data could: how many tokens an expert gets, and what a number is."""

    def __init__(self, model: nn.Module, work: Workload) -> None:
        super().__init__(model)
        # Of the layer that is at work: the share of its slots that each expert gets, in the order in which they lie in memory.
        self._shares: Sequence[float] = ()
        self._visited: Iterator[float] = iter(())
        self._ends: tuple[torch.UntypedStorage, Sequence[int]] | None = None
        self._compared = weakref.WeakSet[torch.UntypedStorage]()
        for experts, shares in _shares(model, work):
            experts.register_forward_pre_hook(self._enter_layer(shares))

    def _enter_layer(self, shares: Sequence[float]) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._shares, self._visited = shares, iter(shares)

        return enter

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the operation's result, or a plausible one where it depends on values."""
        if func in (aten.allclose.default, aten.equal.default):
            return True
        if func is aten._local_scalar_dense.default:
            # Numbers are finite, comparisons of ids fail.
            if args[0].dtype == torch.bool:
                return args[0].untyped_storage() not in self._compared
            if self._ends is not None and args[0].untyped_storage()._cdata == self._ends[0]._cdata:
                return self._ends[1][args[0].storage_offset()]
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            # A mask over experts: all are there. One over slots: those of an expert.
            found = len(args[0]) if args[0].dim() == 1 else round(args[0].numel() * next(self._visited, 0.0))
            return args[0].new_empty((found, args[0].dim()), dtype=torch.long)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [part for index in args[1] for part in _as_numbers(index)], *args[2:])
        result = func(*args, **kwargs)
        if func in (aten.eq.Scalar, aten.eq.Tensor):
            self._compared.add(result.untyped_storage())
        if func is aten.searchsorted.Tensor and result.numel() == len(self._shares):
            # Where the slots of each expert end, once they are sorted by expert.
            numbers = [round(args[0].numel() * part) for part in accumulate(self._shares)]
            self._ends = result.untyped_storage(), numbers
        return result


def _as_numbers(index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """Return a mask over tokens as numbers of tokens: nearly all of them count."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]


def _shares(model: nn.Module, work: Workload) -> Iterator[tuple[nn.Module, list[float]]]:
    """Yield every experts module and the share of its layer's slots that each expert in memory gets."""
    for layer in find_moe_layers(model).values():
        yield layer.experts, [1 / layer.num_experts] * layer.num_experts
    module: Any
    for module in model.modules():
        where = getattr(module, "connito_where", None)
        if where is not None:
            share = _share_by_bank(getattr(module, "connito_residents", None), work)
            places = [0.0] * module.connito_rows
            for place, bank, _ in where:
                places[place] = share.get(bank, 1 / len(where))
            yield module, places


def _share_by_bank(there: Residents | None, work: Workload) -> dict[str, float]:
    """Return the share of one expert by the bank it is in, where experts are not all used alike."""
    if there is None or work.routing_mode != "natural":
        return {}
    targets, beside, total = len(there.targets), len(there.helpers), there.num_experts
    mass = work.mass or targets / total
    other = (1 - mass) / max(1, total - targets)
    absent = other * (total - targets - beside)
    # Slots of absent experts go to the merged expert or else to the helpers; without either nobody serves them.
    extra = 0.0 if there.background or not beside else absent / beside
    return {TARGET: mass / targets, HELPER: other + extra, BACKGROUND: absent}
