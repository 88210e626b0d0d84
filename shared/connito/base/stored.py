"""Layouts in which checkpoints store a model's tensors (names, single or fused experts) and conversion between them.

Only the ranges that are asked for are read.

Many checkpoints keep every expert as tensors of its own, under names that differ from the model's. transformers carries
the rules for each family (its conversion mapping), made for whole models. Here the same rules are applied to single tensors
and to chosen rows of a bank of experts, so that absent experts are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn

# Name of a checkpoint's tensor -> the tensor.
ReadTensor = Callable[[str], "torch.Tensor"]
# (name of a fused tensor in the checkpoint, expert) -> its row.
ReadRow = Callable[[str, int], "torch.Tensor"]


@dataclass(frozen=True)
class Stored:
    """One tensor of the model: the checkpoint's names by source pattern, each in expert order, and the rule that turns
    them into the model's tensor (None: it is stored as it is, under its one name)."""

    name: str
    sources: Mapping[str, Sequence[str]]
    rule: Any = None

    def whole(self, read: ReadTensor) -> torch.Tensor:
        """Return the model's tensor."""
        if self.rule is None:
            return read(self._only)
        return self._convert({pattern: [read(n) for n in names] for pattern, names in self.sources.items()})

    def rows(self, experts: Sequence[int], read: ReadTensor, read_row: ReadRow) -> torch.Tensor:
        """Return rows [len(experts), …] of a bank. Raises `Invalid` where the family's rule mixes experts."""
        import torch

        if self.rule is None:
            return torch.stack([read_row(self._only, expert) for expert in experts])
        if not self.by_expert:
            raise Invalid(
                f"{self.name} is stored in a way that single experts cannot be read from; save the checkpoint with fused "
                "experts (`save_pretrained` of the loaded model) and import that",
                reason=reasons_pb2.REASON_WRONG_TENSORS,
            )
        return self._convert({p: [read(names[expert]) for expert in experts] for p, names in self.sources.items()})

    @property
    def by_expert(self) -> bool:
        """Return whether every source is a list with one tensor per expert that the rule stacks before anything else."""
        from transformers.core_model_loading import MergeModulelist

        first = self.rule.operations[0] if self.rule is not None else None
        return isinstance(first, MergeModulelist) and first.dim == 0

    @property
    def _only(self) -> str:
        ((name,),) = self.sources.values()
        return name

    def _convert(self, tensors: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
        rule = deepcopy(self.rule)
        rule.collected_tensors = dict(tensors)
        try:
            made = rule.convert(self.name)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise Invalid(
                f"the checkpoint's tensors do not make up {self.name}: {error}", reason=reasons_pb2.REASON_WRONG_SHAPE
            ) from error
        value: torch.Tensor | list[torch.Tensor] = made[self.name]
        return value[0] if isinstance(value, list) else value


def locate(model: nn.Module, names: Iterable[str]) -> dict[str, Stored]:
    """Return the stored source of each tensor of `model` (which may be on the meta device) among a checkpoint's `names`.

    A tensor that the checkpoint lacks is left out, and so is what the checkpoint has beyond the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    anyhow: Any = model
    rules = get_model_conversion_mapping(anyhow)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = model.state_dict()
    found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, anyhow.base_model_prefix, wanted)
        if name in wanted and new not in wanted:
            new, pattern = name, None
        if new not in wanted:
            continue
        rule = None if pattern is None else by_pattern[pattern]
        sources = found.setdefault(new, (rule, {}))[1]
        sources.setdefault(pattern or name, []).append(name)
    return {name: Stored(name, sources, rule) for name, (rule, sources) in found.items()}
