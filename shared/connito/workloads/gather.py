"""Routing statistics of domains from whatever describes them: text through a base, traces, or saved statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.blocks import blocks, check_enough, existing, head
from connito.data.reading.rows import Account
from connito.errors import Invalid
from connito.moe.statistics import RoutingStatistics, merge_all, read_trace
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from connito.base.checks import Layout

# Routing decisions per expert, on average, below which a score is chance.
DECISIONS_PER_EXPERT = 10
RECORDED = {".npz": "a routing trace", ".safetensors": "saved statistics"}


def recorded(path: Path) -> bool:
    """Return whether a file holds routing already: a trace (.npz) or saved statistics (.safetensors)."""
    return path.suffix in RECORDED


def read_recorded(path: Path, num_experts: int = 0) -> RoutingStatistics:
    """Return the statistics in a trace or a file of `--save-statistics`. Raises `NotFound` or `Invalid`."""
    if path.suffix == ".npz":
        return read_trace(existing(path), num_experts)
    return RoutingStatistics.from_bytes(existing(path).read_bytes())


@dataclass(frozen=True)
class Router:
    """A base that routes text. Checked before its weights are loaded, as is every text."""

    layout: Layout
    model: nn.Module
    tokenizer: Any
    # What was read of each file, folder or address that was routed.
    accounts: dict[str, Account] = field(default_factory=dict)

    @classmethod
    def load(cls, base: Path, texts: Sequence[Sequence[Path]]) -> Router:
        """Load a base to route `texts`, the files of each domain. Raises what `check_base` raises, and `Invalid` for
        a domain with too little text.
        """
        from connito.base.checks import check_base
        from connito.base.loading import load_full, load_tokenizer
        from connito.moe.device import device_of

        layout, tokenizer = check_base(base), load_tokenizer(base)
        for paths in texts:
            check_enough(tokenizer, paths, least_tokens(layout), layout.vocabulary)
        return cls(layout, load_full(base, device=device_of()), tokenizer)

    def route(self, paths: Sequence[Path], progress: Callable[[float], None] | None = None) -> RoutingStatistics:
        """Count the routing of these texts, read piece by piece."""
        from connito.moe.statistics import collect

        return collect(self.model, blocks(self.tokenizer, paths, progress=progress, accounts=self.accounts))

    def head(self, paths: Sequence[Path], tokens: int) -> npt.NDArray[Any]:
        """Return the first `tokens` of the texts, int32 [n, L + 1]."""
        return head(self.tokenizer, paths, tokens, 257)


def least_tokens(layout: Layout) -> int:
    """Return the number of tokens with which each expert sees ten routing decisions on average."""
    return max(-(-DECISIONS_PER_EXPERT * number // top_k) for number, top_k in layout.experts.values())


def gather(
    domains: Mapping[str, Sequence[Path]],
    route: Callable[[str, list[Path]], RoutingStatistics] | None,
    num_experts: int = 0,
) -> dict[str, RoutingStatistics]:
    """Return statistics by domain: recorded files are read and merged, text files go through `route(domain, files)`.

    Raises `Invalid` for text without a base to route it.
    """
    out = {}
    for name, paths in domains.items():
        texts = [path for path in paths if not recorded(path)]
        if texts and route is None:
            raise Invalid(
                f"{texts[0]} is text, which needs a model to route it: add --base DIR, or give "
                + " or ".join(f"{what} ({suffix})" for suffix, what in RECORDED.items()),
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )
        parts = [read_recorded(path, num_experts) for path in paths if recorded(path)]
        if texts and route is not None:
            parts.append(route(name, texts))
        out[name] = merge_all(parts)
    return out
