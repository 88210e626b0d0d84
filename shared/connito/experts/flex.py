"""Adding experts to a layer, with router rows of their own, beside what is there: opt-in and opt-out without retraining.

After FlexOlmo (Shi et al. 2025): every contributor trains an expert and its router row against one shared, frozen
anchor, so that any set of them can be joined at load time. Whatever the family keeps of each expert comes along: its
rows of the bank, of the router's tables, of a bias that the block owns. Here the rows follow the anchor's in the order
of their digests: the joined model depends on the set alone, and without additions it is the anchor, bit for bit.

Shapes: N anchor experts, m additions to a layer, H hidden size.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from connito.errors import Invalid, NotFound, VerificationFailed
from connito.experts.prune import Keep, prune
from connito.experts.removal import ROUTER, check_prunable, count_again, set_counts, tables
from connito.experts.tape import Tape, each_layer
from connito.moe.adamw import AdamW
from connito.moe.layout import MoELayer, require_moe_layers
from connito.moe.resident import compress
from connito.moe.router import Call, choice
from connito.moe.state import raw_bytes, split_name
from connito.moe.training import BETAS, train_local
from connito.runtime.progress import tell
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

FORMAT = "connito-addition/1"
# So much text, of the contributor's and of all contributors', says where an expert starts.
START_TOKENS = 16384


@dataclass(frozen=True)
class Addition:
    """One contributor's expert: by layer, its row of every table that has one an expert, such as `router.weight` [H]."""

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
    for index, layer in layers.items():
        _extend(layer, [addition.rows[index] for addition in ordered])
    if ordered and layers:
        total = next(iter(layers.values())).num_experts
        for owner in (model, model.config):
            set_counts(owner, total, total + len(ordered))
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


def _check(addition: Addition, layers: Mapping[int, MoELayer]) -> None:
    if set(addition.rows) != set(layers):
        raise Invalid(f"{addition.name} has rows for layers {sorted(addition.rows)}, the anchor has {sorted(layers)}")
    for index, layer in layers.items():
        check_prunable(layer)
        wanted = {part.name: tuple(part.tensor.select(part.dim, 0).shape) for part in tables(layer)}
        given = {name: tuple(row.shape) for name, row in addition.rows[index].items()}
        if given != wanted:
            raise Invalid(
                f"{addition.name} brings {given} to layer {index}, where the anchor needs {wanted}",
                reason=reasons_pb2.REASON_WRONG_SHAPE,
            )


def _extend(layer: MoELayer, rows: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Put `rows` behind the layer's experts, and before classes of the router that are no experts."""
    if not rows:
        return
    for part in tables(layer):
        tensor, own = part.tensor.detach(), layer.num_experts
        more = torch.stack([row[part.name].to(tensor) for row in rows], dim=part.dim)
        before, after = tensor.narrow(part.dim, 0, own), tensor.narrow(part.dim, own, tensor.shape[part.dim] - own)
        part.replace(torch.cat([before, more, after], dim=part.dim))
    count_again(layer, layer.num_experts + len(rows))


def check_growable(layer: MoELayer, call: Call) -> None:
    """Raise `Invalid` unless the layer's router, given one expert more, tells apart one class more, on this call."""
    place = layer.num_experts
    twin: Any = copy.deepcopy(layer.router)
    try:
        rows = {p.name: p.tensor.select(p.dim, 0).detach() for p in tables(layer)}
        block = torch.nn.Module()
        _extend(replace(layer, router=twin, experts=torch.nn.Module(), block=block), [rows])
        args = [_longer(value, place) for value in call.args]
        kwargs = {name: _longer(value, place) for name, value in call.kwargs.items()}
        with torch.no_grad():
            logits, _, ids = choice(twin.forward(*args, **kwargs))
        fits = logits.shape[-1] == call.classes + 1 and int(ids.max()) <= logits.shape[-1]
    except (RuntimeError, IndexError, TypeError, ValueError):
        fits = False
    if not fits:
        raise Invalid(
            f"{type(layer.router).__name__} cannot be given another expert; use a base of another family",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )


def _longer(value: Any, total: int) -> Any:
    """Return what a router is given beside the tokens, such as a bias that its block owns, for one expert more."""
    per_expert = isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) == total
    return torch.cat([value, value[:1]]) if per_expert else value


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
    state the router rows are centred on. The expert starts as the anchor's most used one on the text, its router row as
    the direction of the text's hidden states from the anchor's mean, as long as the anchor's rows are on average; both
    are then trained, everything of the anchor frozen.
    """
    tell(f"training {name} for {len(batches)} steps")
    own = batches.reshape(-1, batches.shape[-1])[:, :-1]
    start = _start(model, name, own, anchor_text)
    grown = copy.deepcopy(model)
    ids = opt_in(grown, [start])[name]
    routers = NewRows(require_moe_layers(grown))
    others = {index: list(range(experts[0])) for index, experts in ids.items()}
    grown = compress(grown, ids, others)
    routers.open()
    state, _ = train_local(grown, batches, learning_rate=learning_rate, beside=routers)
    rows = {index: {**table, **routers.rows[index]} for index, table in start.rows.items()}
    for key, tensor in state.items():
        index, parameter = split_name(key)
        rows[index][parameter] = tensor[0].detach().clone()
    return Addition(name, rows)


class NewRows:
    """The router rows of each layer's last expert, trained beside its bank rows; rows of other experts do not move."""

    def __init__(self, layers: Mapping[int, MoELayer]) -> None:
        self._places = [
            (index, layer.num_experts - 1, part)
            for index, layer in layers.items()
            for part in tables(layer)
            if part.name.startswith(ROUTER) and isinstance(part.tensor, torch.nn.Parameter)
        ]
        self._optimiser = AdamW({}, betas=BETAS)

    @property
    def rows(self) -> dict[int, dict[str, torch.Tensor]]:
        """Return the rows by layer and name, on the CPU."""
        found: dict[int, dict[str, torch.Tensor]] = {index: {} for index, _, _ in self._places}
        for index, place, part in self._places:
            found[index][part.name] = part.tensor.detach().select(part.dim, place).to("cpu", copy=True).contiguous()
        return found

    def open(self) -> None:
        """Let the rows learn: Adam leaves alone what never has a gradient."""
        for _, place, part in self._places:
            part.tensor.requires_grad_(True)
            here = torch.zeros_like(part.tensor)
            here.select(part.dim, place).fill_(1.0)
            part.tensor.register_hook(partial(torch.mul, here))  # type: ignore[no-untyped-call]
        self._optimiser = AdamW({f"{index} {part.name}": part.tensor for index, _, part in self._places}, betas=BETAS)

    def begin(self, _: int, __: int) -> None:
        """Do nothing: a step lets go of its gradients."""

    def loss(self) -> torch.Tensor:
        """Return nothing to add to the loss."""
        return torch.zeros(())

    def step(self, rate: float) -> None:
        """Apply one AdamW step to the rows."""
        self._optimiser.step(rate)


def _start(model: nn.Module, name: str, own: npt.NDArray[Any], anchor_text: npt.NDArray[Any]) -> Addition:
    def mean_state(tape: Tape) -> torch.Tensor:
        check_growable(tape.layer, tape.call)
        return _states(tape).mean(dim=0)

    means = each_layer(model, anchor_text, mean_state, max_tokens=START_TOKENS, check=check_prunable)

    def look(tape: Tape) -> dict[str, torch.Tensor]:
        layer, mean = tape.layer, means[tape.layer.index]
        first = int(torch.bincount(tape.ids.flatten(), minlength=layer.num_experts)[: layer.num_experts].argmax())
        away = _states(tape) - mean
        direction = (away / away.norm(dim=1, keepdim=True).clamp_min(1e-12)).mean(dim=0)
        direction = direction - (direction @ mean) / (mean @ mean) * mean
        direction = direction / direction.norm().clamp_min(1e-12)
        rows = {}
        for part in tables(layer):
            row = part.tensor.detach().select(part.dim, first)
            if part.name.startswith(ROUTER) and part.tensor.dim() == 2 and row.shape == direction.shape:
                row = direction * part.tensor.detach().double().norm(dim=1).mean()
            rows[part.name] = row.to("cpu", part.tensor.dtype, copy=True).contiguous()
        return rows

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
