"""Find a model's tensors in a checkpoint: the names they are stored under, and whether single experts can be read.

Many checkpoints keep every expert as tensors of its own, under names that differ from the model's. transformers carries
the rules for each family (its conversion mapping) and applies them; what is found out here is which stored tensors a rule
takes, so that of a bank of experts only chosen rows need to be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Source:
    """Reading one tensor of a checkpoint by its stored name, and the rows of chosen experts of one."""

    read: Callable[[str], torch.Tensor]
    rows: Callable[[str, Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """One tensor of the model: the checkpoint's names by source pattern, each in the order of its experts, and the rule that
    turns them into the model's tensor (None: it is stored as it is, under its one name)."""

    name: str
    sources: Mapping[str, Sequence[str]]
    rule: Any = None

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors that it is made of."""
        return [name for names in self.sources.values() for name in names]

    @property
    def by_expert(self) -> bool:
        """Return whether every source is a list with one tensor per expert that the rule stacks before anything else."""
        from transformers.core_model_loading import MergeModulelist

        first = self.rule.operations[0] if self.rule is not None else None
        return isinstance(first, MergeModulelist) and first.dim == 0

    def absent(self, bank: torch.Tensor) -> list[int]:
        """Return the experts of a bank [experts, …] whose tensors are missing; none where they are not stored singly."""
        each = self.sources.values() if self.by_expert else ()
        return [expert for names in each for expert in range(len(bank)) if expert not in _numbers(names)]

    def rowwise(self, tensors: Mapping[str, torch.Tensor], bank: torch.Tensor, model: nn.Module) -> bool:
        """Return whether row e of a bank [experts, …] is made of row e, or of the tensors, of expert e and of nothing else.

        `tensors`: the checkpoint's, on the meta device, as `bank` is.
        """
        if self.rule is None:
            return tensors[self.names[0]].shape == bank.shape
        if self.by_expert:
            return all(len(names) == len(bank) for names in self.sources.values())
        if any(len(names) != 1 or tensors[names[0]].shape[:1] != bank.shape[:1] for names in self.sources.values()):
            return False
        one = Source(tensors.__getitem__, lambda name, experts: tensors[name][: len(experts)])
        try:
            return self.rows([0], one, model, None).shape == (1, *bank.shape[1:])
        except Invalid:
            return False

    def rows(self, experts: Sequence[int], source: Source, model: Any, dtype: torch.dtype | None) -> torch.Tensor:
        """Return rows [len(experts), …] of a bank that is `rowwise`, in the type that the library reads its tensors in."""
        if self.rule is None:
            return source.rows(self.names[0], experts).to(dtype=dtype)
        if self.by_expert:
            found = {p: [source.read(names[e]).to(dtype=dtype) for e in experts] for p, names in self.sources.items()}
        else:
            found = {
                p: [source.rows(name, experts).to(dtype=dtype) for name in names] for p, names in self.sources.items()
            }
        return self._convert(found, model)

    def _convert(self, tensors: Mapping[str, list[torch.Tensor]], model: Any) -> torch.Tensor:
        rule = deepcopy(self.rule)
        rule.collected_tensors = dict(tensors)
        try:
            made: torch.Tensor | list[torch.Tensor] = rule.convert(self.name, model=model, config=model.config)[
                self.name
            ]
        except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise Invalid(
                f"the checkpoint's tensors do not make up {self.name}: {error}", reason=reasons_pb2.REASON_WRONG_SHAPE
            ) from error
        return made[0] if isinstance(made, list) else made


def _numbers(names: Sequence[str]) -> set[int]:
    """Return the numbers in which names that are otherwise the same differ."""
    digits = [tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name))) for name in names]
    if len(digits) < 2:
        return {number for each in digits for number in each}
    varying = [set(column) for column in zip(*digits, strict=False) if len(set(column)) > 1]
    return varying[0] if varying else set()


def locate(model: nn.Module, names: Iterable[str]) -> dict[str, Stored]:
    """Return the stored source of each tensor of `model` (which may be on the meta device) among a checkpoint's `names`.

    A tensor that the checkpoint lacks is left out, and so is what the checkpoint has beyond the model. Where a rule makes
    several tensors of one source, the source stands under the first of them.
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
    wanted, prefix = model.state_dict(), anyhow.base_model_prefix
    found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if new not in wanted and name in wanted:
            new, pattern = rename_source_key(name, [], [], prefix, wanted)
        if new not in wanted:
            continue
        rule = None if pattern is None else by_pattern[pattern]
        sources = found.setdefault(new, (rule, {}))[1]
        sources.setdefault(pattern or name, []).append(name)
    return {name: Stored(name, sources, rule) for name, (rule, sources) in found.items()}


def torch_dtypes() -> dict[str, torch.dtype]:
    """Return torch's type by the format's name."""
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    return {**str_to_torch_dtype, "F8_E8M0": torch.float8_e8m0fnu}


def format_name(dtype: torch.dtype) -> str:
    """Return the format's name of a type."""
    return next((name for name, found in torch_dtypes().items() if found == dtype), str(dtype))
