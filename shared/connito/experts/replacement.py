"""Upgrading one expert of a model that has others: they stay as they are, and every other domain within a margin (BAR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.experts.compose import Part, layers_of, state_of
from connito.moe.evaluate import Evaluator
from connito.moe.rows import assert_only_changed, fingerprint
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


@dataclass(frozen=True)
class Upgrade:
    """Losses in nats per token by domain, before and after; `changed` rows; everything else has the digest it had."""

    before: dict[str, float]
    after: dict[str, float]
    changed: list[str]


def replace_expert(
    model: nn.Module, part: Part, domain: str, sequences: Mapping[str, npt.NDArray[Any]], *, margin: float = 0.01
) -> Upgrade:
    """Replace the rows of `part` in `model`, which may hold other experts elsewhere. `sequences` [n, L + 1] by domain.

    The upgrade stands only if the loss of `domain` falls and no other domain's rises by more than `margin` nats per
    token; otherwise the model is as it was and `Invalid` (GATE_REJECTED) says by how much it failed.
    """
    if domain not in sequences:
        raise Invalid(
            f"there is no text of {domain!r} to measure the upgrade on; give some of {sorted(sequences)} and it"
        )
    evaluator = Evaluator(model, layers_of(part.rows))
    digests = fingerprint(model)
    before = {name: mean_loss(evaluator, table) for name, table in sequences.items()}
    evaluator.put(state_of(part.rows))
    try:
        after = {name: mean_loss(evaluator, table) for name, table in sequences.items()}
        _check(before, after, domain, margin)
        changed = assert_only_changed(digests, model, layers_of(part.rows))
    except BaseException:
        evaluator.restore()
        raise
    return Upgrade(before, after, changed)


def mean_loss(evaluator: Evaluator, sequences: npt.NDArray[Any]) -> float:
    """Return the loss of the model as it is now, in nats per token."""
    sums, tokens = evaluator.losses(None, sequences)
    return float(sums.sum() / tokens.sum())


def _check(before: Mapping[str, float], after: Mapping[str, float], domain: str, margin: float) -> None:
    if not after[domain] < before[domain]:
        raise Invalid(
            f"this is no upgrade: {domain} goes from {before[domain]:.4f} to {after[domain]:.4f} nats per token; "
            "the old expert stays",
            reason=reasons_pb2.REASON_GATE_REJECTED,
        )
    for name, loss in after.items():
        if name != domain and not loss <= before[name] + margin:
            raise Invalid(
                f"the upgrade costs {name} {loss - before[name]:+.4f} nats per token, more than {margin:g}; "
                "the old expert stays",
                reason=reasons_pb2.REASON_GATE_REJECTED,
            )
