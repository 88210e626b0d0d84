"""Rules by which tokens choose among variants of experts, saved to a file and loaded again.

A routing file is safetensors: gates `layers.<l>` [V, H] for a trained router, nothing for the others, and in its head the
method and the digests of the variants, in their order. Arrow's prototypes are computed from the variants, never stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from connito.data.documents import parse_json
from connito.errors import Invalid, NotFound
from connito.experts.arrow import Mixing, arrow, fixed, linear_router, train_router, variants
from connito.experts.compose import Part, RowKey
from connito.moe.layout import require_moe_layers

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

FORMAT = "connito-routing/1"
METHODS = ("arrow", "molora", "uniform")


@dataclass(frozen=True)
class Routing:
    """`weights` for fixed mixtures, `gates` for a trained router, `top_k` for Arrow; `digests` of the variants."""

    method: str
    digests: tuple[str, ...]
    top_k: int = 0
    weights: tuple[float, ...] = ()
    gates: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        method: str,
        model: nn.Module,
        parts: Sequence[Part],
        base: Mapping[RowKey, torch.Tensor],
        *,
        top_k: int = 1,
        text: npt.NDArray[Any] | None = None,
        steps: int = 40,
    ) -> Routing:
        """Build the routing of a name: arrow, molora (trained on `text` int32 [n, L + 1]), uniform, or one-hot:N.
        Raises `Invalid` for others.
        """
        digests = tuple(part.digest for part in parts)
        if method == "arrow":
            return cls(method, digests, top_k=top_k)
        if method == "molora" and text is not None:
            return cls(method, digests, gates=train_router(model, parts, base, text, steps=steps))
        if method == "uniform":
            return cls("fixed", digests, weights=(1 / len(parts),) * len(parts))
        name, _, place = method.partition(":")
        if name == "one-hot" and place.isdecimal() and int(place) < len(parts):
            return cls.one_hot(parts, int(place))
        raise Invalid(
            f"no routing is called {method!r}: use {', '.join(METHODS)} or one-hot:0 to one-hot:{len(parts) - 1}"
        )

    @classmethod
    def one_hot(cls, parts: Sequence[Part], place: int) -> Routing:
        """Return a routing that uses only the expert at `place`, exactly."""
        weights = tuple(float(index == place) for index in range(len(parts)))
        return cls("fixed", tuple(part.digest for part in parts), weights=weights)

    def save(self, path: Path) -> None:
        """Write the routing file."""
        from safetensors.torch import save_file

        head = {"format": FORMAT, "method": self.method, "digests": json.dumps(self.digests),
                "top_k": str(self.top_k), "weights": json.dumps(self.weights)}  # fmt: skip
        # safetensors cannot be empty of tensors and still be read everywhere: fixed mixtures carry their weights.
        tensors = {f"layers.{index}": gate.contiguous() for index, gate in self.gates.items()}
        save_file(tensors or {"weights": torch.tensor(self.weights or (0.0,))}, path, head)

    @classmethod
    def load(cls, path: Path) -> Routing:
        """Read it back. Raises `NotFound` and `Invalid`."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise NotFound(f"there is no routing file {path}; write one with `connito library route --out`")
        try:
            with safe_open(path, "pt") as file:
                head = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise Invalid(f"{path} is not a routing file")
                gates = {int(n[7:]): file.get_tensor(n) for n in file.keys() if n.startswith("layers.")}  # noqa: SIM118
            digests, weights = parse_json(head["digests"]), parse_json(head["weights"])
            return cls(head["method"], tuple(digests), int(head["top_k"]), tuple(weights), gates)
        except (SafetensorError, KeyError, ValueError) as error:
            raise Invalid(f"{path} is damaged: {error!r}; write it again") from error


@contextmanager
def variants_of(
    model: nn.Module, parts: Sequence[Part], base: Mapping[RowKey, torch.Tensor], routing: Routing
) -> Iterator[nn.Module]:
    """Make tokens choose among `parts` by `routing` inside the block. Raises `Invalid` if it was made for other variants."""
    if tuple(part.digest for part in parts) != routing.digests:
        raise Invalid("this routing was made for other experts, or for these in another order")
    with variants(model, parts, base, _mixing(model, parts, base, routing)) as routed:
        yield routed


def _mixing(model: nn.Module, parts: Sequence[Part], base: Mapping[RowKey, torch.Tensor], routing: Routing) -> Mixing:
    if routing.method == "arrow":
        layer = next(iter(require_moe_layers(model).values()))
        turned = bool(getattr(layer.experts, "is_transposed", False))
        return arrow(parts, base, top_k=routing.top_k, transposed=turned)
    return linear_router(routing.gates) if routing.method == "molora" else fixed(routing.weights)
