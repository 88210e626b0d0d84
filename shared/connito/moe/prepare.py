"""A compressed model made ready for the machine that trains it: where its layers lie, and how they compute.

Nothing here changes what is computed. Layers below the first adapted one need no backward pass, so they may lie in the
host's memory and visit the device for as long as they run; several devices share the rest, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from connito.errors import Invalid
from connito.moe.batches import HOME
from connito.moe.device import has_grouped
from connito.moe.engine import Engine
from connito.moe.resident import adapted_layers, group_experts
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn


def prepare(model: nn.Module, engine: Engine, device: torch.device) -> nn.Module:
    """Put a compressed model on `device`, or on the engine's devices, as the engine says, and return it.

    Raises `Invalid` for an attention kernel that this machine or the family does not have.
    """
    devices = [torch.device(name) for name in engine.devices] or [device]
    below, above = decoder_halves(model)
    guests = below if engine.offload_prefix else []
    _place(model, devices, guests, [] if len(devices) == 1 else [*([] if guests else below), *above])
    if engine.attention:
        _attend(model, engine.attention)
    if engine.experts == "grouped" or (engine.experts == "auto" and all(map(has_grouped, devices))):
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
        group_experts(model)
    for layer in (*below, *above) if engine.compile else ():
        layer.forward = torch.compile(layer.forward)
    for layer in above if engine.checkpointing else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def decoder_halves(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the decoder layers below the first adapted one, and the others."""
    first, (experts, _) = next(iter(adapted_layers(model).items()))
    name = next(name for name, module in model.named_modules() if module is experts)
    layers = decoder_layers(model, name)
    return layers[:first], layers[first:]


def decoder_layers(model: nn.Module, inside: str) -> list[nn.Module]:
    """Return the decoder's layers, of which one holds the module that is called `inside`."""
    return list(model.get_submodule(inside.rpartition("layers.")[0] + "layers").children())


def share(sizes: Sequence[int], parts: int) -> list[int]:
    """Return for each of some layers which of `parts` devices takes it: in order, in parts of about equal bytes."""
    total, done, found = sum(sizes), 0, []
    for size in sizes:
        found.append(min(parts - 1, int((done + size / 2) * parts / max(1, total))))
        done += size
    return found


def _place(
    model: nn.Module, devices: Sequence[torch.device], guests: Sequence[nn.Module], shared: Sequence[nn.Module]
) -> None:
    """Move what is no guest to its device: each of the `shared` layers to one of them, everything else to the first."""
    settled = {id(module) for guest in guests for module in guest.modules()}
    setattr(model, HOME, devices[0])
    if guests and (embedding := _own_embedding(model)) is not None:
        # Few rows of it are wanted: they travel, the table stays.
        settled.add(id(embedding))
        embedding.register_forward_pre_hook(lambda module, args: _to(module.weight.device, args))
        embedding.register_forward_hook(lambda _m, _a, output: _to(devices[0], output))
    for layer, part in zip(shared, share([_bytes(layer) for layer in shared], len(devices)), strict=True):
        layer.to(devices[part])
        settled |= {id(module) for module in layer.modules()}
        layer.register_forward_pre_hook(partial(_bring, devices[part]), with_kwargs=True)
    if shared:
        shared[-1].register_forward_hook(lambda _m, _a, output: _to(devices[0], output))
    module: Any
    for module in model.modules():
        if id(module) not in settled:
            module._apply(lambda tensor: tensor.to(devices[0]), recurse=False)
    for guest in guests:
        visit = _Visit(guest, devices[0])
        guest.register_forward_pre_hook(visit.arrive)
        guest.register_forward_hook(visit.leave, always_call=True)


class _Visit:
    """A frozen module whose tensors lie in the host's memory and are on a device while it runs."""

    def __init__(self, guest: nn.Module, device: torch.device) -> None:
        self._device = device
        self._home: list[tuple[dict[str, Any], str, torch.Tensor]] = [
            (held, name, tensor)
            for module in guest.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        for _, _, tensor in self._home if device.type == "cuda" else ():
            # Copies from pinned memory do not wait for each other.
            tensor.data = tensor.data.pin_memory()

    def arrive(self, *_: Any) -> None:
        for held, name, tensor in self._home:
            copy = tensor.detach().to(self._device, non_blocking=True)
            held[name] = (
                torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy
            )

    def leave(self, *_: Any) -> None:
        for held, name, tensor in self._home:
            held[name] = tensor


def _own_embedding(model: Any) -> Any:
    """Return the input embedding, or None where the output layer works with the same tensor in every step."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    return None if output is not None and output.weight is embedding.weight else embedding


def _bring(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _to(device, args), _to(device, kwargs)


def _to(device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(device, item) for item in value)
    return {key: _to(device, item) for key, item in value.items()} if isinstance(value, dict) else value


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(module.parameters(), module.buffers()))


def _attend(model: Any, kernel: str) -> None:
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError, KeyError) as error:
        raise Invalid(
            f"attention kernel {kernel!r} cannot be used for this model on this machine: {error}; leave CONNITO_ATTENTION "
            "empty for the best that there is",
            reason=reasons_pb2.REASON_BAD_SPEC,
        ) from error
