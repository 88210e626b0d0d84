"""Counts of a router's decisions on some text, from which every selection method works.

Shapes: T tokens, N experts, k experts per token. Everything is an integer and adds up: a corpus read in pieces, by
several workers and in any order gives the same bytes as one reader, in memory that does not depend on its length.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from connito.data.packing import content_of, text_of, tokens_of
from connito.data.safetensors_header import read_header_text
from connito.errors import Invalid, NotFound
from connito.moe.layout import router_digest
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn


FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Gate weights are counted in units of this size: sums of integers do not depend on the order, sums of floats do.
GATE_UNIT = 2.0**-30


@dataclass
class LayerRouting:
    """One layer: how often each expert was chosen, with what total gate weight, and beside whom."""

    tokens: int
    top_k: int
    counts: IntArray  # [N] times chosen
    gate_units: IntArray  # [N] gate weight received, in units of GATE_UNIT
    first: IntArray  # [N] times chosen first
    together: IntArray  # [N, N] times chosen for the same token; the diagonal equals counts

    @property
    def token_score(self) -> FloatArray:
        """Return r[e] = mean over all tokens of 1[e in top-k] / k, [N]; sums to 1 (ESFT, Wang et al. 2024, eq. 7)."""
        return np.asarray(self.counts / max(1, self.tokens * self.top_k))

    @property
    def gate_sums(self) -> FloatArray:
        """Return the gate weight received, [N]."""
        return np.asarray(self.gate_units * GATE_UNIT)

    @property
    def gate_score(self) -> FloatArray:
        """Return g[e] = mean over all tokens of the gate weight given to e, [N] (ESFT, Wang et al. 2024, eq. 6)."""
        return np.asarray(self.gate_sums / max(1, self.tokens))


@dataclass
class RoutingStatistics:
    """Routing on one domain's text, by layer.

    `probes`: SHA-256 of each piece of text that was counted, sorted. `routers`: SHA-256 of the routers that chose, which
    stay what they are in every version of a base; empty where it is not known (a trace).
    """

    layers: dict[int, LayerRouting] = field(default_factory=dict)
    probes: tuple[str, ...] = ()
    routers: str = ""

    @property
    def tokens(self) -> int:
        """Return the number of tokens read, the same in every layer."""
        return max((layer.tokens for layer in self.layers.values()), default=0)

    def add(self, layer: int, num_experts: int, ids: npt.NDArray[Any], weights: npt.NDArray[Any]) -> None:
        """Count one batch: expert ids and gate weights, both [T, k]. Ids outside 0..N−1 (skipped slots) do not count."""
        known = self.layers.get(layer) or _empty(num_experts, ids.shape[1])
        flat_ids, flat_weights = ids.astype(np.int64), weights.astype(np.float64)
        if not np.isfinite(flat_weights).all():
            raise Invalid(
                f"the router of layer {layer} gave weights that are not finite: the model is damaged, or its type overflows; "
                "load it in F32 or BF16, or copy it again",
                reason=reasons_pb2.REASON_NON_FINITE,
            )
        inside = (flat_ids >= 0) & (flat_ids < num_experts)
        known.counts += np.bincount(flat_ids[inside], minlength=num_experts)
        np.add.at(known.gate_units, flat_ids[inside], np.rint(flat_weights[inside] / GATE_UNIT).astype(np.int64))
        strongest = flat_ids[np.arange(len(ids)), flat_weights.argmax(axis=1)] if len(ids) else flat_ids[:, 0]
        known.first += np.bincount(strongest[(strongest >= 0) & (strongest < num_experts)], minlength=num_experts)
        for a, b in np.ndindex(ids.shape[1], ids.shape[1]):
            both = inside[:, a] & inside[:, b]
            pairs = flat_ids[both, a] * num_experts + flat_ids[both, b]
            known.together += np.bincount(pairs, minlength=num_experts**2).reshape(num_experts, num_experts)
        known.tokens += len(ids)
        self.layers[layer] = known

    def merge(self, other: RoutingStatistics) -> RoutingStatistics:
        """Return the exact statistics of both texts together; the order of merging does not change the bytes.

        Raises `Invalid` when they are of different models, or hold the same piece of text.
        """
        if self.routers and other.routers and self.routers != other.routers:
            raise Invalid(
                f"these are statistics of different models: their routers are {self.routers[:12]} and {other.routers[:12]}; "
                "collect all of them on one base",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )
        if twice := set(self.probes) & set(other.probes):
            raise Invalid(
                f"the text {min(twice)[:12]} is in both statistics and would count twice; leave one of them out",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )
        probes = tuple(sorted((*self.probes, *other.probes)))
        out = RoutingStatistics(dict(self.layers), probes, self.routers or other.routers)
        for index, theirs in other.layers.items():
            ours = out.layers.get(index)
            if ours is not None and (len(ours.counts), ours.top_k) != (len(theirs.counts), theirs.top_k):
                raise Invalid(
                    f"layer {index} has {len(ours.counts)} experts in one and {len(theirs.counts)} in the other: these are "
                    "statistics of different models",
                    reason=reasons_pb2.REASON_SELECTION_FAILED,
                )
            out.layers[index] = (
                theirs
                if ours is None
                else LayerRouting(
                    ours.tokens + theirs.tokens,
                    ours.top_k,
                    ours.counts + theirs.counts,
                    ours.gate_units + theirs.gate_units,
                    ours.first + theirs.first,
                    ours.together + theirs.together,
                )
            )
        return out

    def to_bytes(self) -> bytes:
        """Return the statistics as safetensors; totals are in the metadata. One metadata key: the writer does not keep
        their order.
        """
        from safetensors.numpy import save

        tensors: dict[str, npt.NDArray[Any]] = {}
        for index, layer in self.layers.items():
            tensors |= {
                f"layers.{index}.size": np.array([layer.tokens, layer.top_k], dtype=np.int64),
                f"layers.{index}.counts": layer.counts,
                f"layers.{index}.gate_units": layer.gate_units,
                f"layers.{index}.first": layer.first,
                f"layers.{index}.together": layer.together,
            }
        about = {"probes": list(self.probes), "routers": self.routers}
        return bytes(save(tensors, metadata={"connito": json.dumps(about, sort_keys=True)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> RoutingStatistics:
        """Return the inverse of `to_bytes`. Raises `Invalid` for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(data)
            header = json.loads(read_header_text(io.BytesIO(data), len(data)))
            about = json.loads(header.get("__metadata__", {}).get("connito", "{}"))
            out = cls({}, tuple(about.get("probes", ())), about.get("routers", ""))
            for index in sorted({int(name.split(".")[1]) for name in tensors}):
                tokens, top_k = (int(x) for x in tensors[f"layers.{index}.size"])
                counts, units, first, together = (
                    tensors[f"layers.{index}.{name}"] for name in ("counts", "gate_units", "first", "together")
                )
                out.layers[index] = LayerRouting(tokens, top_k, counts, units, first, together)
        except (SafetensorError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise Invalid(
                f"these are not routing statistics: {error!r}; make them with `connito select … --save-statistics FILE`",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            ) from error
        return out


def merge_all(parts: Iterable[RoutingStatistics]) -> RoutingStatistics:
    """Merge all statistics. Raises `Invalid` as `merge` does."""
    out = RoutingStatistics()
    for part in parts:
        out = out.merge(part)
    return out


def read_trace(path: Path, num_experts: int = 0) -> RoutingStatistics:
    """Return statistics from a routing trace: an `.npz` with `layer_<l>_ids` and `layer_<l>_weights`, both [tokens, k].

    The number of experts is `num_experts`, else the file's own `num_experts`, else one more than the largest id.
    Raises `NotFound` or `Invalid` for a file that is not a trace.
    """
    if not path.exists():
        raise NotFound(f"there is no routing trace at {path}")
    try:
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise Invalid(
            f"{path} is not an .npz archive of arrays: {error}", reason=reasons_pb2.REASON_SELECTION_FAILED
        ) from error
    out = from_arrays(arrays, num_experts, str(path))
    out.probes = (hashlib.sha256(data).hexdigest(),)
    return out


def from_arrays(arrays: dict[str, npt.NDArray[Any]], num_experts: int, what: str) -> RoutingStatistics:
    """Return `read_trace` on arrays that are already in memory; `what` names them in errors."""
    layers = sorted(
        int(name[6:-4])
        for name in arrays
        if name.startswith("layer_") and name.endswith("_ids") and name[6:-4].isdigit()
    )
    if not layers:
        raise Invalid(
            f"{what} has no layer_<l>_ids arrays: a routing trace holds layer_<l>_ids and layer_<l>_weights, [tokens, k] each",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )
    if not num_experts and "num_experts" in arrays:
        num_experts = int(arrays["num_experts"])
    largest = max((int(ids.max()) for layer in layers if (ids := arrays[f"layer_{layer}_ids"]).size), default=-1)
    total = num_experts or largest + 1
    if largest >= total:
        raise Invalid(
            f"{what} names expert {largest}, but --num-experts is {total}", reason=reasons_pb2.REASON_SELECTION_FAILED
        )
    out = RoutingStatistics()
    for layer in layers:
        ids, weights = arrays[f"layer_{layer}_ids"], arrays.get(f"layer_{layer}_weights")
        if weights is None or ids.ndim != 2 or ids.shape != weights.shape:
            raise Invalid(
                f"layer {layer} of {what} needs layer_{layer}_ids and layer_{layer}_weights of one shape [tokens, k]",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )
        out.add(layer, total, ids, weights)
    return out


def collect(
    model: nn.Module,
    sequences: npt.NDArray[Any] | Iterable[npt.NDArray[Any]],
    batch_tokens: int = 2048,
    served: dict[int, FloatArray] | None = None,
) -> RoutingStatistics:
    """Route `sequences` ([n, L], ids or records of `connito.data.packing`, or several such arrays of different L) through
    `model` and count. What fills a row of records up is left out.

    `served` is filled with the sums [N, H], by layer, of the hidden states that each expert was chosen for.
    Reads what the routers report, through forward hooks: some families choose by more than their logits. Sequences may
    come from a generator: one array is in memory at a time. Raises `Invalid` for a dense model, an unsupported family or
    an empty probe.
    """
    import torch

    from connito.moe.batches import as_taken, placed, positions_of, separates
    from connito.moe.layout import require_moe_layers
    from connito.moe.side_by_side import side_by_side

    # Before anything listens to the routers.
    separates(model)
    layers = require_moe_layers(model)
    out, read = RoutingStatistics(routers=router_digest(layers)), hashlib.sha256()
    count = _Count(out, served)
    handles = [
        layer.router.register_forward_hook(partial(count.hook, index, layer.num_experts))
        for index, layer in layers.items()
    ]
    groups = [sequences] if isinstance(sequences, np.ndarray) else sequences
    device = next(model.parameters()).device
    body: Any = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)

    def route(rows: npt.NDArray[Any]) -> None:
        ids = torch.from_numpy(tokens_of(rows).astype(np.int64)).to(device)
        count.now.text = torch.from_numpy(text_of(rows).reshape(-1)).to(device)
        with torch.inference_mode():
            body(input_ids=ids, use_cache=False, **placed(positions_of(rows, device)))

    try:
        for group in groups:
            read.update(f"{group.shape}".encode() + content_of(group))
            # Sums of states would come out by the order of batches.
            with side_by_side(device, group.size if served is None else 0, batch_tokens) as (_, at_once):
                for _ in at_once(route, _batches(as_taken(group, model), batch_tokens)):
                    pass
    finally:
        for handle in handles:
            handle.remove()
    if out.tokens == 0:
        raise Invalid(
            "the probe text is empty: give text of the target domain", reason=reasons_pb2.REASON_SELECTION_FAILED
        )
    out.probes = (read.hexdigest(),)
    return out


@dataclass
class _Count:
    """Counter of batches. `now.text`: bool [T], which of the tokens that the routers see in this thread are text."""

    out: RoutingStatistics
    served: dict[int, FloatArray] | None
    now: threading.local = field(default_factory=threading.local)
    turn: threading.Lock = field(default_factory=threading.Lock)

    def hook(self, index: int, total: int, _: nn.Module, args: Any, output: Any) -> None:
        """Add what the router of layer `index`, with `total` experts, has chosen."""
        from connito.moe.router import choice

        _logits, weights, ids = choice(output)
        ids, weights = self._of_text(ids), self._of_text(weights)
        if self.served is not None:
            states = self._of_text(args[0]).double()
            sums = states.new_zeros(total, states.shape[1])
            for slot in ids.T:
                inside = (slot >= 0) & (slot < total)
                sums.index_add_(0, slot[inside], states[inside])
            self.served[index] = self.served.get(index, 0.0) + sums.cpu().numpy()
        chosen, given = ids.cpu().numpy(), weights.detach().float().cpu().numpy()
        with self.turn:
            self.out.add(index, total, chosen, given)

    def _of_text(self, values: torch.Tensor) -> torch.Tensor:
        flat = values.reshape(-1, values.shape[-1])
        return flat if self.now.text.all() else flat[self.now.text]


def _batches(group: npt.NDArray[Any], batch_tokens: int) -> Iterable[npt.NDArray[Any]]:
    size = max(1, batch_tokens // max(1, group.shape[1]))
    return (group[start : start + size] for start in range(0, len(group), size))


def _empty(num_experts: int, top_k: int) -> LayerRouting:
    return LayerRouting(
        0,
        top_k,
        np.zeros(num_experts, dtype=np.int64),
        np.zeros(num_experts, dtype=np.int64),
        np.zeros(num_experts, dtype=np.int64),
        np.zeros((num_experts, num_experts), dtype=np.int64),
    )
