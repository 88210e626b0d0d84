"""Leave experts out: mask them in routing, remove them for good, or drop them window by window of a task.

Shapes: T calibration tokens, H hidden size, N experts, k experts per token. `Keep`: kept expert ids by layer, ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.errors import Invalid
from connito.experts.measure import loss
from connito.experts.removal import check_prunable, check_same, remove_experts, set_counts
from connito.moe.layout import MoELayer, find_moe_layers, require_moe_layers
from connito.moe.router import Call
from connito.moe.statistics import collect
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

Keep = dict[int, list[int]]
# Of a task's training, after each of which experts may go.
WINDOWS = 5


@contextmanager
def masked(model: nn.Module, keep: Mapping[int, list[int]]) -> Iterator[nn.Module]:
    """Make routers choose among `keep` only inside the block: the pruned model's function, with nothing removed.

    Raises `Invalid` when a layer is first used whose router could not do the same with the others gone.
    """
    layers = require_moe_layers(model)
    check_keep(layers, keep)
    with ExitStack() as stack:
        for index, experts in keep.items():
            layer = layers[index]
            check_prunable(layer)
            stack.callback(layer.router.register_forward_hook(_among(layer, experts), with_kwargs=True).remove)
        yield model


def _among(layer: MoELayer, keep: list[int]) -> Callable[..., tuple[Any, ...]]:
    checked = False

    def hook(router: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, ...]:
        nonlocal checked
        call = Call(router, args, output, kwargs)
        if not checked:
            check_same(layer, call, keep)
            checked = True
        return call.among(torch.tensor(keep), layer.num_experts, alone=True)

    return hook


def prune(model: nn.Module, keep: Mapping[int, list[int]]) -> nn.Module:
    """Remove every expert that is not in `keep` from its layer, in place. Layers that `keep` leaves out stay whole.

    The model's configuration follows where all layers keep the same number; `connito.experts.export` needs that.
    """
    layers = require_moe_layers(model)
    check_keep(layers, keep)
    for index, experts in keep.items():
        remove_experts(layers[index], list(experts))
    if layers:
        _follow(model, next(iter(layers.values())).num_experts)
    return model


def _follow(model: Any, before: int) -> None:
    # Not required to compute: the configuration may still send a token to more experts than there are now.
    counts = {layer.num_experts for layer in find_moe_layers(model).values()}
    if len(counts) == 1:
        for owner in (model, model.config):
            set_counts(owner, before, *counts)


def check_keep(layers: Mapping[int, MoELayer], keep: Mapping[int, list[int]]) -> None:
    """Raise `Invalid` unless every layer keeps at least one of its own experts, ascending."""
    for index, experts in keep.items():
        known = index in layers and experts and experts == sorted(set(experts))
        if not known or experts[0] < 0 or experts[-1] >= layers[index].num_experts:
            raise Invalid(
                f"layer {index} cannot keep experts {experts}: name at least one of its own, ascending",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )


def progressive(
    model: nn.Module,
    sequences: npt.NDArray[Any],
    count: int = 1,
    *,
    windows: int = WINDOWS,
    threshold: float = 1.0,
    tune: Callable[[nn.Module], None] | None = None,
) -> tuple[Keep, list[tuple[int, float]]]:
    """Drop experts window by window of a task's training until `count` a layer are left, in place.

    After Task-Specific Expert Pruning (Chen et al. 2022): an expert's proficiency c_e adds up its share of the layer's
    gate weight over the windows; after window t of E those with c_e < threshold · t/E · max c go, and after the last all
    but the best `count`. `tune` trains what is left before each window is counted. Returns the kept experts by their ids
    in the model as it was, and (most experts a layer, loss) at the start and after each window in which some went.
    """
    layers = require_moe_layers(model)
    left = {index: list(range(layer.num_experts)) for index, layer in layers.items()}
    proficiency = {index: np.zeros(layer.num_experts) for index, layer in layers.items()}
    history = [(max(map(len, left.values())), loss(model, sequences))]
    for window in range(1, windows + 1):
        if max(map(len, left.values())) <= count:
            break
        if tune is not None:
            tune(model)
        for index, seen in collect(model, sequences[:, :-1]).layers.items():
            proficiency[index] += seen.gate_sums / max(float(seen.gate_sums.sum()), 1e-300)
        share = threshold * window / windows
        keep = {index: proficient(c, share, count, last=window == windows) for index, c in proficiency.items()}
        if all(len(experts) == len(left[index]) for index, experts in keep.items()):
            continue
        with masked(model, keep):
            after = loss(model, sequences)
        prune(model, keep)
        left = {index: [left[index][e] for e in experts] for index, experts in keep.items()}
        proficiency = {index: proficiency[index][experts] for index, experts in keep.items()}
        history.append((max(map(len, left.values())), after))
    return left, history


def proficient(proficiency: npt.NDArray[np.float64], share: float, count: int, *, last: bool) -> list[int]:
    """Return the experts whose proficiency reaches `share` of the best's, at least `count`; after the last window `count`."""
    order = [int(e) for e in np.argsort(-proficiency, kind="stable")]
    reach = [e for e in order if proficiency[e] >= share * proficiency[order[0]]]
    return sorted(order[:count] if last or len(reach) < count else reach)
