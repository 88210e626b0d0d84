"""Bytes of the tensors that are alive while torch computes, by what they are for.

Works on real tensors and on fake ones, which have shapes and no memory: the same count measures a training step and
rehearses it. What a kernel takes and gives back inside is not seen; on the CPU that is little.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from connito.moe.resident import target_parameters

if TYPE_CHECKING:
    from torch import nn

WEIGHTS, BUFFERS, OPTIMIZER, GRADIENTS, ACTIVATIONS = PARTS = (
    "weights", "buffers", "optimizer", "gradients", "activations"
)  # fmt: skip
# What is alive is written down again whenever it has grown by this share since.
_FINENESS = 0.002


class _Peak:
    """The largest sum, and about what was alive then."""

    def __init__(self) -> None:
        self.bytes = self._written = 0
        self.alive: list[tuple[int, int]] = []

    def see(self, live: int, alive: dict[int, tuple[int, int]]) -> None:
        if live > self.bytes:
            self.bytes = live
            if live > self._written * (1 + _FINENESS):
                self._written, self.alive = live, list(alive.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages inside its `with` block, each once; `parts()` is what the largest sum was made of.

    The model's own tensors count as weights and buffers, gradients of target rows and what autograd keeps are recognised,
    and what is still there when `step_done` is called is the optimiser's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        # By storage: its number and bytes. By number: what it is for. A freed storage's address serves another one later.
        self._alive: dict[int, tuple[int, int]] = {}
        self._kinds: dict[int, str] = {}
        # Before a step's first gradient, and from there on.
        self._peaks = _Peak(), _Peak()
        self._gradients = False
        self._numbers = count()
        self._stack = ExitStack()
        self._model = model

    def __enter__(self) -> LiveBytes:
        """Count the model, and watch optimisers and autograd from here on."""
        for parameter in self._model.parameters():
            self.name(WEIGHTS, parameter)
        for buffer in self._model.buffers():
            self.name(BUFFERS if buffer.dim() < 2 else WEIGHTS, buffer)
        for parameter in target_parameters(self._model).values():
            hook = parameter.register_post_accumulate_grad_hook(self._gradient)  # type: ignore[no-untyped-call]
            self._stack.callback(hook.remove)
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._kept, lambda tensor: tensor))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop counting."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it returns."""
        if func is torch.ops.prim.device.default:
            return func(*args)
        result = self.answer(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the operation's result."""
        return func(*args, **kwargs)

    def parts(self) -> dict[str, int]:
        """Return bytes by part at the peak; `workspace` is what none of the others names."""
        return max(self.moments(), key=lambda parts: sum(parts.values()))

    def moments(self) -> list[dict[str, int]]:
        """Return the same before a step's first gradient, and from there on."""
        return [self._parts(peak) for peak in self._peaks]

    def _parts(self, peak: _Peak) -> dict[str, int]:
        found = dict.fromkeys(PARTS, 0)
        for number, size in peak.alive:
            kind = self._kinds.get(number)
            if kind is not None:
                found[kind] += size
        return {**found, "workspace": peak.bytes - sum(found.values())}

    def step_done(self, *_: object) -> None:
        """Take everything that nobody has named for the optimiser's: a training step is over, its own tensors are gone."""
        self._gradients = False
        for number, _size in self._alive.values():
            self._kinds.setdefault(number, OPTIMIZER)

    def name(self, kind: str, tensor: torch.Tensor) -> None:
        """Say what a tensor is for; the first name stays."""
        self._kinds.setdefault(self._count(tensor), kind)

    def _count(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return self._alive[key][0]
        number, size = next(self._numbers), storage.nbytes()
        self._alive[key] = number, size
        weakref.finalize(storage, self._freed, key)
        self.live += size
        self._peaks[self._gradients].see(self.live, self._alive)
        return number

    def _freed(self, key: int) -> None:
        self.live -= self._alive.pop(key)[1]

    def _gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._gradients = True
            self.name(GRADIENTS, parameter.grad)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        self.name(ACTIVATIONS, tensor)
        return tensor
