"""The beginning of a decoder that nothing changes: layers below the first adapted one, whose results are computed once.

How the family wires its layers is left to the family: the model's own forward runs, with the layers below replaced by a
shortcut.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.moe.batches import as_taken, home_of, mixed, placed, separates
from connito.moe.head import Head
from connito.moe.prepare import decoder_halves, decoder_layers

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from connito.data.packing import Rows


class Beginnings:
    """Results of the layers below the first adapted one for rows [n, L + 1], kept from one pass over them for others.

    Counting where a cycle's tokens go runs through the same frozen layers as the first step on them. A row that is kept takes
    its hidden states [L, H], on the device of the first adapted layer.
    """

    def __init__(self, model: nn.Module, *, bf16: bool) -> None:
        """Keep nothing for a model whose first layer is adapted, or in which the shortcut changes anything."""
        below, above = decoder_halves(model)
        self._model, self._shortcut = model, Shortcut(below, above[0])
        self._rows: dict[bytes, torch.Tensor] = {}
        with mixed(home_of(model), bf16=bf16):
            self._use = bool(below) and self._shortcut.agrees(Head(model))

    def keep(self, rows: Rows) -> AbstractContextManager[None]:
        """Let go of what was kept, and keep what the one forward pass over `rows` inside the block shows."""
        self._rows.clear()
        # Before anything listens: whoever takes rows measures this once, by passes over rows of its own.
        separates(self._model)
        # A model that mixes documents takes other rows than these.
        if not self._use or as_taken(rows, self._model) is not rows:
            return nullcontext()
        return self._shortcut.seen(lambda hidden: self._rows.update(zip(map(row_key, rows), hidden, strict=True)))

    def enter(self, rows: Rows) -> AbstractContextManager[None]:
        """Begin the forward passes over `rows` inside the block from what is kept, where that is all of them."""
        kept = [self._rows[key] for key in map(row_key, rows) if key in self._rows]
        return self._shortcut.enter_with(torch.stack(kept)) if kept and len(kept) == len(rows) else nullcontext()


class _Stop(Exception):  # noqa: N818 - not an error
    """Leaves a forward pass once the wanted hidden states are there."""


class Shortcut:
    """Enters a decoder at layer k: the layers below hand their input on, layer k starts from given hidden states."""

    def __init__(self, below: list[nn.Module], entry: nn.Module) -> None:
        self._below, self._entry = below, entry
        self._now = _Now()

    @classmethod
    def find(cls, model: nn.Module, experts_name: str) -> Shortcut | None:
        """Return the decoder layer list that `experts_name` lies in, or None when there is no such list."""
        index, layers = int(experts_name.rpartition("layers.")[2].split(".")[0]), decoder_layers(model, experts_name)
        return cls(layers[:index], layers[index]) if index < len(layers) else None

    def capture(self, model: nn.Module, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return the input of layer k, [n, L, H]."""
        found: list[torch.Tensor] = []

        def stop(hidden: torch.Tensor) -> None:
            found.append(hidden)
            raise _Stop

        with self.seen(stop), suppress(_Stop):
            model(input_ids=ids, use_cache=False, **placed(positions))
        return found[0]

    def agrees(self, head: Head) -> bool:
        """Return whether entering at layer k gives the losses of the whole model, tried on three short sequences."""
        device = home_of(head.model)
        vocabulary = int(head.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        # Three: two rows would pass for the pair that layers of some families return.
        ids = (torch.arange(72, device=device).view(3, 24) * 7919) % vocabulary
        try:
            with torch.inference_mode():
                hidden = self.capture(head.model, ids[:, :-1])
                full = head.nll(ids[:, :-1], ids[:, 1:])
                with self.enter_with(hidden):
                    quick = head.nll(ids[:, :-1], ids[:, 1:])
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            return False
        return bool(torch.allclose(full, quick, rtol=1e-5, atol=1e-6))

    @contextmanager
    def seen(self, show: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Show what enters layer k, [n, L, H], in every forward pass inside the block."""
        with self._opened():
            now = self._now
            now.show = show
            try:
                yield
            finally:
                now.show = None

    @contextmanager
    def enter_with(self, hidden: torch.Tensor) -> Iterator[None]:
        """Make a forward pass skip the layers below and start layer k from `hidden` inside the block."""
        with self._opened():
            now = self._now
            now.hidden = hidden
            try:
                yield
            finally:
                now.hidden = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let several threads capture and enter inside the block, each with hidden states of its own."""
        with self._opened():
            self._now = _Own()
            try:
                yield
            finally:
                self._now = _Now()

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Change the layers for the block, unless the block around it has done so for all threads."""
        if isinstance(self._now, _Own):
            yield
            return
        # A layer that was compiled has a forward of its own.
        own = [layer.__dict__.get("forward") for layer in self._below]
        for layer in self._below:
            layer.forward = partial(self._below_or_not, layer.forward)
        handle = self._entry.register_forward_pre_hook(self._enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for layer, forward in zip(self._below, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        show, hidden = self._now.show, self._now.hidden
        if show is not None:
            show(args[0] if args else kwargs["hidden_states"])
        if hidden is None:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _below_or_not(self, forward: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden_states, *args, **kwargs) if self._now.hidden is None else hidden_states


class _Now:
    """Shows and enters in every thread alike, since a backward pass may recompute a layer in another one."""

    show: Callable[[torch.Tensor], None] | None = None
    hidden: torch.Tensor | None = None


class _Own(_Now, threading.local):
    """Shows and enters in each thread by itself."""


def row_key(row: npt.NDArray[Any]) -> bytes:
    """Return what tells a row [L + 1] from all others."""
    return hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest()
