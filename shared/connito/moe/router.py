"""A family's own router: what it reports, and the same router asked to choose otherwise.

Families score experts by softmax, sigmoid or something else, add biases for the choice alone, limit it to groups, and
normalise and scale weights before or after it. None of that is written down here: the family's code runs, and only its
choice, a top-k over all experts, is given other candidates or another k. A router that chooses by anything else is
refused by name.

Shapes: T tokens, N experts, C ≥ N classes of the router (some have one that is no expert), k experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

_TOPK = (torch.topk, torch.Tensor.topk)
_MAX = (torch.max, torch.Tensor.max)
_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


def choice(output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (logits, weights, ids) that a router reported. Raises `Invalid` for a router that reports something else."""
    fits = (
        isinstance(output, tuple)
        and len(output) >= 3
        and all(isinstance(part, torch.Tensor) for part in output[:3])
        and not output[2].is_floating_point()
        and output[1].shape == output[2].shape
    )
    if not fits:
        raise Invalid(
            "this family's router does not report (logits, weights, ids), so its routing can be neither measured nor "
            "replaced; use a family that follows the transformers experts interface",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )
    return output[0], output[1], output[2]


def linear_map(router: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight [C, H] and bias [C] of the one map that scores experts. Raises `Invalid` where there is not one."""
    maps = [m for m in router.modules() if isinstance(w := getattr(m, "weight", None), torch.Tensor) and w.dim() == 2]
    if len(maps) != 1:
        raise Invalid(
            f"{type(router).__name__} does not score experts by one linear map, so no other can stand in its place",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    found: Any = maps[0]
    return found.weight, getattr(found, "bias", None)


def scores_of(router: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return what a router's linear map says of `tokens` [T, H], float32 [T, C]."""
    weight, bias = linear_map(router)
    return F.linear(tokens.float(), weight.float(), None if bias is None else bias.float())


@dataclass(frozen=True)
class Call:
    """One call of a router: the module, what it was given, and what it reported."""

    router: nn.Module
    args: tuple[Any, ...]
    output: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Return the number of things the router chooses from, C."""
        return int(choice(self.output)[0].shape[-1])

    def among(self, experts: torch.Tensor, num_experts: int, *, top_k: int = 0, alone: bool = False) -> tuple[Any, ...]:
        """Return what the router reports when it may choose among `experts` only, ids ascending; at most `top_k` of them.

        alone: the others are not there at all, so that scores that share one sum share it among `experts`. A token has
        fewer slots where there are fewer experts.
        """
        rest = torch.arange(num_experts, self.classes, device=experts.device)
        open_ = torch.cat([experts, rest]).to(choice(self.output)[2].device)
        return self._asked(_Candidates(self.classes, num_experts, top_k, places=open_, alone=alone))

    def fewer(self, top_k: int, allowed: torch.Tensor | None = None) -> tuple[Any, ...]:
        """Return what the router reports at another `top_k`; with `allowed`, bool [T, C], each token among its own."""
        return self._asked(_Candidates(self.classes, self.classes, top_k, allowed=allowed))

    def scored(self, logits: torch.Tensor, top_k: int = 0) -> tuple[Any, ...]:
        """Return what the router reports where its linear map gives `logits` [T, C]; `top_k` 0 is the family's own.

        Biases of the choice, groups, norms and scales are the family's. Raises `Invalid` for a router that has no such map.
        """
        with _Scores(linear_map(self.router)[0].shape, logits) as scores:
            output = self.fewer(top_k)
        if not scores.used:
            raise Invalid(
                f"{type(self.router).__name__} does not score experts by one linear map, so no other can stand in its place",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )
        return output

    def _asked(self, candidates: _Candidates) -> tuple[Any, ...]:
        view: Any = copy.copy(self.router)
        before = choice(self.output)[2].shape[-1]
        slots = candidates.slots(before)
        if isinstance(getattr(view, "top_k", None), int):
            view.top_k = slots
        with candidates:
            output: tuple[Any, ...] = view.forward(*self.args, **self.kwargs)
        if not candidates.used or choice(output)[2].shape[-1] != slots:
            raise Invalid(
                f"{type(self.router).__name__} does not choose experts by a top-k over all of them, so it cannot be asked "
                f"for {slots} of {candidates.size}; use routing_mode natural and the family's own number of experts a token",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )
        return output


class _Candidates(TorchFunctionMode):
    """Gives a router's choice other candidates inside the block: `places` for all tokens, or `allowed` token by token."""

    def __init__(
        self,
        classes: int,
        num_experts: int,
        top_k: int,
        *,
        places: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.classes, self.num_experts, self.top_k, self.alone = classes, num_experts, top_k, alone
        self.places, self.allowed = places, allowed
        self.size = classes if places is None else len(places)
        self.absent = torch.ones(classes, dtype=torch.bool, device=None if places is None else places.device)
        if places is not None:
            self.absent[places] = False
        self.used = False

    def slots(self, before: int) -> int:
        """Return how many slots a token has afterwards, that had `before`."""
        return min(self.top_k or before, before, self.size)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` as it is, unless it chooses among all experts, or shares one sum among them."""
        known = dict(kwargs or {})
        if func in _TOPK and _last(args, known, 2):
            return self._topk(func, args, known)
        if func in _MAX and (len(args) > 1 or "dim" in known) and _last(args, known, 1):
            return self._max(func, args, known)
        if self.alone and func in _SOFTMAX and args[0].shape[-1] == self.classes and _last(args, known, 1):
            return func(args[0].masked_fill(self.absent, -torch.inf), *args[1:], **known)
        return func(*args, **known)

    def _topk(self, func: Callable[..., Any], args: tuple[Any, ...], known: dict[str, Any]) -> Any:
        scores, k = args[0], int(args[1] if len(args) > 1 else known.pop("k"))
        if scores.shape[-1] != self.classes:
            return func(self._without_absent(scores), k, *args[2:], **known)
        self.used = True
        if self.allowed is not None:
            scores = scores.masked_fill(~self.allowed.view(scores.shape), -torch.inf)
        if self.places is not None:
            scores = scores.index_select(-1, self.places)
        top = func(scores, self.slots(k), *args[2:], **known)
        return top if self.places is None else torch.return_types.topk((top[0], self.places[top[1]]))

    def _max(self, func: Callable[..., Any], args: tuple[Any, ...], known: dict[str, Any]) -> Any:
        scores = args[0]
        if self.places is None or scores.shape[-1] != self.classes:
            return func(self._without_absent(scores), *args[1:], **known)
        self.used = True
        best = func(scores.index_select(-1, self.places), *args[1:], **known)
        return torch.return_types.max((best[0], self.places[best[1]]))

    def _without_absent(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores by group, [T, groups, N / groups], with absent experts below all others of their token."""
        if self.places is None or scores.dim() != 3 or scores.shape[-2] * scores.shape[-1] != self.num_experts:
            return scores
        lowest = scores.amin(dim=(-2, -1), keepdim=True) - 1
        return torch.where(self.absent[: self.num_experts].view(scores.shape[-2:]), lowest, scores)


class _Scores(TorchFunctionMode):
    """Gives a router other scores inside the block: `logits` in the place of what its map of that `shape` gives."""

    def __init__(self, shape: torch.Size, logits: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.logits, self.used = shape, logits, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` as it is, unless it is the map."""
        if func is F.linear and args[1].shape == self.shape:
            self.used = True
            return self.logits.to(args[0].dtype).view(*args[0].shape[:-1], self.shape[0])
        return func(*args, **dict(kwargs or {}))


def _last(args: tuple[Any, ...], known: Mapping[str, Any], position: int) -> bool:
    """Return whether a call works along the last dimension of its first argument."""
    dim = args[position] if len(args) > position else known.get("dim", -1)
    return isinstance(dim, int) and dim in (-1, args[0].dim() - 1)
