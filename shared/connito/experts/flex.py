"""Adding experts to a layer, with router rows of their own, beside what is there: opt-in and opt-out without retraining.

After FlexOlmo (Shi et al. 2025): every contributor trains experts and their router rows against one shared, frozen
anchor, so that any set of them can be joined at load time. Here the rows follow the anchor's in the order of their
digests: the joined model depends on the set alone, and without additions it is the anchor, bit for bit.

Shapes: N anchor experts, m additions to a layer, H hidden size.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from connito.errors import Invalid, NotFound, VerificationFailed
from connito.experts.prune import Keep, prune
from connito.experts.removal import COUNTS, check_prunable
from connito.experts.tape import Tape, each_layer
from connito.moe.layout import MoELayer, require_moe_layers
from connito.moe.resident import compress
from connito.moe.state import raw_bytes, split_name
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

# Router tensors with a row per expert that an addition may bring; `weight` [N, H] it must.
ROUTER = "router."
FORMAT = "connito-addition/1"
# So much text, of the contributor's and of all contributors', says where an expert starts.
START_TOKENS = 16384


@dataclass(frozen=True)
class Addition:
    """One contributor's expert: by layer, its row of every expert tensor and, as `router.weight` [H], its router row."""

    name: str
    rows: Mapping[int, Mapping[str, torch.Tensor]]

    @property
    def digest(self) -> str:
        """Return SHA-256 over all rows: the identity by which additions are ordered."""
        state = hashlib.sha256()
        for layer in sorted(self.rows):
            for name in sorted(self.rows[layer]):
                state.update(f"{layer} {name} {tuple(self.rows[layer][name].shape)}\n".encode())
                state.update(raw_bytes(self.rows[layer][name]))
        return state.hexdigest()


def opt_in(model: nn.Module, additions: Sequence[Addition]) -> dict[str, Keep]:
    """Join `additions` to the anchor `model`, in place; returns the ids that each got, by layer.

    Raises `Invalid`, before anything is changed, for additions that leave out a layer or a tensor, bring one of another
    shape, or come twice.
    """
    layers = require_moe_layers(model)
    ordered = sorted(additions, key=lambda addition: addition.digest)
    names = [addition.name for addition in ordered]
    if len(set(names)) != len(names) or len({a.digest for a in ordered}) != len(ordered):
        raise Invalid(f"an addition is given twice: {', '.join(sorted(names))}; opt each in once")
    for addition in ordered:
        _check(addition, layers)
    ids = {
        addition.name: {index: [layer.num_experts + place] for index, layer in layers.items()}
        for place, addition in enumerate(ordered)
    }
    modules = dict(model.named_modules())
    for index, layer in layers.items():
        for module, prefix in ((layer.experts, ""), (layer.router, ROUTER)):
            _extend(module, prefix, layer.num_experts, [addition.rows[index] for addition in ordered])
        _count(modules[layer.experts_name.rpartition(".")[0]], layer.num_experts, len(ordered))
    config: Any = model.config
    _count(config, next(iter(layers.values())).num_experts, len(ordered))
    return ids


def opt_out(model: nn.Module, ids: Mapping[str, Keep], names: Sequence[str]) -> None:
    """Take additions out again, in place: what is left is what opting in the others alone would have given."""
    for name in names:
        if name not in ids:
            raise NotFound(f"{name} was not opted in; there are {', '.join(sorted(ids)) or 'none'}")
    layers = require_moe_layers(model)
    gone = {index: {ids[name][index][0] for name in names} for index in layers}
    # Pruning lowers top-k where too few are left; the anchor alone has enough.
    prune(model, {i: [e for e in range(layer.num_experts) if e not in gone[i]] for i, layer in layers.items()})


def _check(addition: Addition, layers: Mapping[int, Any]) -> None:
    if set(addition.rows) != set(layers):
        raise Invalid(f"{addition.name} has rows for layers {sorted(addition.rows)}, the anchor has {sorted(layers)}")
    for index, layer in layers.items():
        check_growable(layer)
        wanted = {name: tuple(getattr(layer.experts, name).shape[1:]) for name in layer.parameters}
        wanted[f"{ROUTER}weight"] = (layer.router.weight.shape[-1],)
        given = {name: tuple(row.shape) for name, row in addition.rows[index].items()}
        if given != wanted:
            raise Invalid(
                f"{addition.name} brings {given} to layer {index}, where the anchor needs {wanted}",
                reason=reasons_pb2.REASON_WRONG_SHAPE,
            )


def check_growable(layer: MoELayer) -> None:
    """Raise `Invalid` unless a new expert needs one row of the router's own weight, and nothing else that knows experts."""
    check_prunable(layer)
    tables, weight = dict(layer.router.state_dict()), getattr(layer.router, "weight", None)
    plain = set(tables) == {"weight"} and isinstance(weight, torch.Tensor) and len(weight) == layer.num_experts
    if not plain or len(inspect.signature(layer.router.forward).parameters) > 1:
        raise Invalid(
            f"{type(layer.router).__name__} keeps more of each expert than a row of one weight, and nothing says what that "
            "should be for a new expert; grow a base of a family such as OLMoE, Qwen or Mixtral",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )


def _extend(module: Any, prefix: str, total: int, rows: Sequence[Mapping[str, torch.Tensor]]) -> None:
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None and tensor.ndim and tensor.shape[0] == total and rows:
                joined = torch.cat([tensor.detach(), *(row[prefix + name][None].to(tensor) for row in rows)])
                table[name] = torch.nn.Parameter(joined, requires_grad=False) if table is module._parameters else joined
    _count(module, total, len(rows))


def _count(owner: Any, total: int, more: int) -> None:
    for name in COUNTS:
        if getattr(owner, name, None) == total:
            setattr(owner, name, total + more)


def grow(
    model: nn.Module,
    name: str,
    batches: npt.NDArray[Any],
    anchor_text: npt.NDArray[Any],
    *,
    learning_rate: float,
) -> Addition:
    """Train one addition to the anchor `model`, which is not touched, on a contributor's own text.

    batches: int32 [H, B, L + 1]; anchor_text: public text int32 [n, L], the same for every contributor, whose mean hidden
    state the router rows are centred on. The expert starts as the anchor's most used one on the text; its router row is
    the direction of the text's hidden states from the anchor's mean, as long as the anchor's rows are on average.
    Raises `Invalid` for families whose router has more tables per expert than its weight.
    """
    from connito.moe.training import train_local

    own = batches.reshape(-1, batches.shape[-1])[:, :-1]
    start = _start(model, name, own, anchor_text)
    grown = copy.deepcopy(model)
    ids = opt_in(grown, [start])[name]
    others = {index: list(range(experts[0])) for index, experts in ids.items()}
    state, _ = train_local(compress(grown, ids, others), batches, learning_rate=learning_rate)
    rows = {index: dict(table) for index, table in start.rows.items()}
    for key, tensor in state.items():
        index, parameter = split_name(key)
        rows[index][parameter] = tensor[0].detach().clone()
    return Addition(name, rows)


def _start(model: nn.Module, name: str, own: npt.NDArray[Any], anchor_text: npt.NDArray[Any]) -> Addition:
    def mean_state(tape: Tape) -> torch.Tensor:
        return _states(tape).mean(dim=0)

    means = each_layer(model, anchor_text, mean_state, max_tokens=START_TOKENS, check=check_growable)

    def look(tape: Tape) -> dict[str, torch.Tensor]:
        layer, mean = tape.layer, means[tape.layer.index]
        weight: Any = layer.router.weight
        first = int(torch.bincount(tape.ids.flatten(), minlength=layer.num_experts).argmax())
        away = _states(tape) - mean
        direction = (away / away.norm(dim=1, keepdim=True).clamp_min(1e-12)).mean(dim=0)
        direction = direction - (direction @ mean) / (mean @ mean) * mean
        row = direction / direction.norm().clamp_min(1e-12) * weight.double().norm(dim=1).mean()
        rows = {p: getattr(layer.experts, p)[first].detach().to("cpu", copy=True) for p in layer.parameters}
        return {**rows, f"{ROUTER}weight": row.to("cpu", weight.dtype)}

    return Addition(name, each_layer(model, own, look, max_tokens=START_TOKENS))


def _states(tape: Tape) -> torch.Tensor:
    """Return what the layer's router reads, [T, H]."""
    states: torch.Tensor = tape.call.args[0]
    return states.reshape(-1, states.shape[-1]).double()


def save_addition(addition: Addition, path: Path) -> None:
    """Write an addition as safetensors, tensors `layers.<l>.<name>`."""
    tensors = {f"layers.{i}.{n}": row.contiguous() for i, rows in addition.rows.items() for n, row in rows.items()}
    save_file(tensors, path, {"format": FORMAT, "name": addition.name, "digest": addition.digest})


def load_addition(path: Path) -> Addition:
    """Read an addition back. Raises `NotFound`, `Invalid`, or `VerificationFailed` when its rows are others now."""
    if not path.is_file():
        raise NotFound(f"there is no addition {path}; train one with `connito library grow`")
    try:
        with safe_open(path, "pt") as file:
            head = file.metadata() or {}
            rows: dict[int, dict[str, torch.Tensor]] = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                _, index, parameter = name.split(".", 2)
                rows.setdefault(int(index), {})[parameter] = file.get_tensor(name)
    except (SafetensorError, ValueError) as error:
        raise Invalid(f"{path} is damaged: {error}; train it again", reason=reasons_pb2.REASON_BAD_HEADER) from error
    if head.get("format") != FORMAT:
        raise Invalid(f"{path} is not an addition", reason=reasons_pb2.REASON_BAD_HEADER)
    found = Addition(head["name"], rows)
    if found.digest != head["digest"]:
        raise VerificationFailed(f"the rows in {path} are not those that were trained; get it again")
    return found
