"""Per-sequence losses of many expert states on one full model, at the cost of the layers that can differ.

Below the first adapted layer the hidden states of a held-out sequence never change, whatever a miner submits. They are
computed once per sequence and kept; a state is then judged by running the remaining layers only. How the family wires
its layers is left to the family: the model's own forward runs, with the layers below replaced by a shortcut.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.data.packing import Rows, apart, counted
from connito.errors import Invalid
from connito.moe.batches import batch_of, placed, separates, several
from connito.moe.head import Head
from connito.moe.layout import as_targets, check_routers, check_targets, require_moe_layers
from connito.moe.prefix import Shortcut, row_key
from connito.moe.rows import check_state, read_rows
from connito.moe.side_by_side import side_by_side
from connito.moe.state import split_name
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


class Evaluator:
    """Losses of states of one selection on one full model. Not thread-safe: states are written into the model."""

    def __init__(
        self, model: nn.Module, selection: Any, *, batch_tokens: int = 2048, cache_bytes: int = 1 << 30
    ) -> None:
        """Run `batch_tokens` at a time and cache at most `cache_bytes` of hidden states, those that came first.

        States are evaluated on the same sequences one after the other: were the oldest entry thrown out for the newest,
        a cache a little too small would hold none of them when it comes to the next state.

        Raises `Invalid` when the selection is empty or does not fit the model.
        """
        self.model = model.eval()
        self.targets = as_targets(selection)
        self._layers = require_moe_layers(model)
        check_targets(self._layers, self.targets)
        check_routers(self._layers, selection)
        if not self.targets:
            raise Invalid(
                "the selection is empty: there is nothing to evaluate", reason=reasons_pb2.REASON_SELECTION_FAILED
            )
        self.base = read_rows(model, self.targets)
        self._head = Head(model)
        self._batch_tokens, self._cache_bytes = batch_tokens, cache_bytes
        self._cache: dict[bytes, torch.Tensor] = {}
        self._cached, self._caching = 0, threading.Lock()
        self._device = next(model.parameters()).device
        self._shortcut = Shortcut.find(model, self._layers[min(self.targets)].experts_name)
        if self._shortcut is not None and not self._shortcut.agrees(self._head):
            self._shortcut = None

    def put(self, state: Mapping[str, torch.Tensor]) -> None:
        """Write `state` into the model. Raises `Invalid`, leaving the model as it was, when it does not fit."""
        check_state(self._layers, self.targets, state)
        with torch.no_grad():
            for name, rows in state.items():
                index, parameter = split_name(name)
                bank = getattr(self._layers[index].experts, parameter)
                for row, expert in zip(rows, self.targets[index], strict=True):
                    bank[expert].copy_(row)

    def restore(self) -> None:
        """Put the base rows back."""
        self.put(self.base)

    def losses(
        self,
        state: Mapping[str, torch.Tensor] | None,
        sequences: npt.NDArray[Any],
        on_batch: Callable[[int, int], None] | None = None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return (sum of negative log-likelihoods in nats, float64 [n]; tokens, int64 [n]) for sequences [n, L + 1], ids or
        records of `connito.data.packing`, of which those tokens are summed that count.

        `state` None means whatever is in the model. Equals a plain forward of the full model, document by document where
        the sequences tell them apart. `on_batch(done, n)`.
        """
        if sequences.ndim != 2 or sequences.shape[1] < 2:
            raise Invalid(
                f"sequences must be [n, L + 1] with L ≥ 1, not {sequences.shape}", reason=reasons_pb2.REASON_BAD_SPEC
            )
        if state is not None:
            self.put(state)
        count, length = sequences.shape[0], sequences.shape[1] - 1
        sums = np.zeros(count, dtype=np.float64)
        done = 0
        with self._side_by_side(count * length) as (side, at_once):
            for found in at_once(self._batch, self._batches(sequences, side)):
                sums[done : done + len(found)] = found
                done += len(found)
                if on_batch is not None:
                    on_batch(done, count)
        return sums, counted(sequences)

    def warm(self, sequences: npt.NDArray[Any]) -> None:
        """Compute and keep the hidden states of `sequences` ahead of time."""
        with self._side_by_side(sequences.size) as (side, at_once):
            for _ in at_once(lambda part: self._hidden(self._taken(part)[0]), self._batches(sequences, side)):
                pass

    @contextmanager
    def begun(self, sequences: Rows) -> Iterator[None]:
        """Let the one forward pass over all of `sequences` [n, L + 1] inside the block begin at the first adapted layer, where
        the model can. What lies below runs here, side by side, and is not kept.
        """
        with ExitStack() as stack:
            if self._shortcut is not None and not (several(sequences) and not separates(self.model)):
                with self._side_by_side(sequences.size) as (_, at_once):
                    hidden = torch.stack(list(at_once(self._captured, (row[None] for row in sequences))))
                stack.enter_context(self._shortcut.enter_with(hidden))
            yield

    def _batches(self, sequences: Rows, side: int) -> Iterator[Rows]:
        """Yield the sequences in batches; where several are computed at once, of a size that gives each of `side` as many."""
        size = max(1, self._batch_tokens // max(1, sequences.shape[1] - 1))
        if side > 1:
            rounds = math.ceil(len(sequences) / (size * side))
            size = math.ceil(len(sequences) / (rounds * side))
        return (np.ascontiguousarray(sequences[at : at + size]) for at in range(0, len(sequences), size))

    @contextmanager
    def _side_by_side(self, tokens: int) -> Iterator[tuple[int, Callable[..., Iterable[Any]]]]:
        """Yield what `side_by_side` does. Where a forward pass changes the model for others, there is one at a time."""
        if self._shortcut is None or not self._head.is_plain:
            yield 1, map
            return
        with self._shortcut.apart(), side_by_side(self._device, tokens, self._batch_tokens) as found:
            yield found

    def _batch(self, part: Rows) -> npt.NDArray[np.float64]:
        rows = len(part)
        part, owner = self._taken(part)
        batch = batch_of(part, self.model)
        with torch.inference_mode():
            hidden = self._hidden(part)
            with ExitStack() as stack:
                if hidden is not None and self._shortcut is not None:
                    stack.enter_context(self._shortcut.enter_with(hidden))
                nll = self._head.nll(*batch)
            sums: npt.NDArray[np.float64] = nll.double().sum(dim=1).cpu().numpy()
        return sums if owner is None else np.bincount(owner, sums, rows).astype(np.float64)

    def _taken(self, part: Rows) -> tuple[Rows, npt.NDArray[np.int64] | None]:
        """Return rows as the model can take them and, where each document got one of its own, the row that it was in."""
        return apart(part) if several(part) and not separates(self.model) else (part, None)

    def _hidden(self, part: npt.NDArray[Any]) -> torch.Tensor | None:
        """Return hidden states [n, L, H] that enter the first adapted layer, from the cache where they are."""
        if self._shortcut is None:
            return None
        keys = [row_key(row) for row in part]
        rows = [self._cache[key] if key in self._cache else self._captured(part[[i]]) for i, key in enumerate(keys)]
        for key, row in zip(keys, rows, strict=True):
            self._remember(key, row)
        return torch.stack(rows)

    def _captured(self, row: npt.NDArray[Any]) -> torch.Tensor:
        """Return what enters the first adapted layer for a sequence [1, L + 1], [L, H].

        Each by itself: how a product is rounded depends on how many rows share it, and which sequences are in the cache
        already depends on what was drawn before. An auditor has drawn other things and must get the same to the bit.
        """
        assert self._shortcut is not None
        batch = batch_of(row, self.model)
        with torch.inference_mode():
            return self._shortcut.capture(self.model, batch.ids, batch.positions)[0]

    def keep_only(self, sequences: Iterable[npt.NDArray[Any]]) -> None:
        """Let go of the hidden states of all sequences [L + 1] but these, unless there is room for as many again."""
        if 2 * self._cached <= self._cache_bytes:
            return
        wanted = {row_key(document) for row in sequences for document in self._taken(row[None])[0]}
        self._cache = {key: row for key, row in self._cache.items() if key in wanted}
        self._cached = sum(_bytes(row) for row in self._cache.values())

    def _remember(self, key: bytes, row: torch.Tensor) -> None:
        with self._caching:
            if key not in self._cache and self._cached + _bytes(row) <= self._cache_bytes:
                self._cache[key] = row.clone()
                self._cached += _bytes(row)


class PartialForward:
    """Token ids [n, L] that run through a model once; from a layer with experts up they run as often as asked.

    positions: [n, L], where rows hold several documents.
    """

    def __init__(
        self, model: nn.Module, experts_names: Iterable[str], ids: torch.Tensor, positions: torch.Tensor | None = None
    ) -> None:
        self._model, self._ids, self._positions = model, ids, positions
        self._shortcuts = {name: Shortcut.find(model, name) for name in experts_names}
        self._hidden: dict[str, torch.Tensor] = {}

    def begin(self) -> torch.Tensor:
        """Return logits [n, L, V] of the whole model, and keep what enters the layers that were named."""
        with ExitStack() as stack:
            for name, shortcut in self._shortcuts.items():
                if shortcut is not None:
                    stack.enter_context(shortcut.seen(partial(self._hidden.__setitem__, name)))
            return self._forward()

    @property
    def kept_bytes(self) -> int:
        """Return the size of what is kept."""
        return sum(map(_bytes, self._hidden.values()))

    def check(self, experts_name: str, whole: torch.Tensor) -> bool:
        """Return whether the shortcut to this layer gives the logits of `begin`, with the model as it was then; else drop it."""
        try:
            same = torch.allclose(whole, self.logits(experts_name), rtol=1e-4, atol=1e-5)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            same = False
        if not same:
            self._shortcuts[experts_name] = None
        return same

    def logits(self, experts_name: str) -> torch.Tensor:
        """Return logits [n, L, V] of the model as it is now, where it has changed in this layer and above only."""
        shortcut = self._shortcuts[experts_name]
        if shortcut is None:
            return self._forward()
        with shortcut.enter_with(self._hidden[experts_name]):
            return self._forward()

    def _forward(self) -> torch.Tensor:
        out: torch.Tensor = self._model(input_ids=self._ids, use_cache=False, **placed(self._positions)).logits
        return out


def _bytes(row: torch.Tensor) -> int:
    return row.numel() * row.element_size()
