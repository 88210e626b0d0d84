"""`connito.library`: grow, join and branches: experts beside the base's own, and MoEs of dense models. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from connito.base.branches import import_branches
from connito.base.description import build_manifest
from connito.base.loading import load_full, load_tokenizer
from connito.curation.texts import cut_by_domain, cut_sequences, digests
from connito.errors import NotFound
from connito.experts import flex
from connito.experts.export import ModelSource, export_model
from connito.experts.measure import BaselineLosses
from connito.library.derived import base_of
from connito.library.schema import Base, ExpertRecord
from connito.moe.device import device_of
from connito.moe.layout import require_moe_layers


@dataclass(frozen=True)
class GrowOptions:
    """Texts that an addition is trained on. `data`: the domain's text; `anchor`: public text, the same for every contributor."""

    data: Sequence[Path]
    anchor: Sequence[Path]
    steps: int = 30
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class BranchOptions:
    """Options for joining dense models. `branches`: folder by name; `texts`: text by name, for the router; `moe_layers`: how
    many of the last layers get experts; `measure`: text by domain."""

    branches: Mapping[str, Path]
    texts: Mapping[str, Path]
    moe_layers: int
    top_k: int = 2
    measure: Mapping[str, Path] = field(default_factory=dict)


def grow(name: str, base: Path, out: Path, options: GrowOptions) -> flex.Addition:
    """Train an expert with a router row of its own beside the base's, which stays as it is, into the file `out`
    (FlexOlmo)."""
    tokenizer = load_tokenizer(base)
    table = cut_sequences(tokenizer, options.data)
    size, steps = min(4, len(table)), range(options.steps)
    batches = np.stack([np.take(table, range(size * i, size * (i + 1)), axis=0, mode="wrap") for i in steps])
    anchor = cut_sequences(tokenizer, options.anchor)[:, :-1]
    made = flex.grow(load_full(base, device=device_of()), name, batches, anchor, learning_rate=options.learning_rate)
    flex.save_addition(made, out)
    return made


def join(additions: Sequence[Path], base: Path, out: Path, measure: Mapping[str, Path] | None = None) -> ExpertRecord:
    """Put additions beside the base's experts, in any order and with no training, into the new folder `out` (FlexOlmo).

    Returns the record. `measure`: text by domain.
    """
    model, tokenizer, manifest = load_full(base, device=device_of()), load_tokenizer(base), build_manifest(base)
    before = BaselineLosses.of(model, cut_by_domain(tokenizer, measure or {}))
    anchors = {str(index): list(range(layer.num_experts)) for index, layer in require_moe_layers(model).items()}
    members = [flex.load_addition(path) for path in additions]
    ids = flex.opt_in(model, members)
    added = [{"name": m.name, "digest": m.digest, "experts": ids[m.name]} for m in members]
    settings = {"additions": added, "anchor": anchors}
    source = ModelSource("join", base_of(manifest), settings=settings, losses=before.compare(model))
    return export_model(model, out, tokenizer, source)


def branches(seed: Path, out: Path, options: BranchOptions) -> ExpertRecord:
    """Make one MoE of dense specialists of one `seed`: their MLPs are its experts, the rest is averaged (BTX).

    Returns the record of the new folder `out`. Raises `NotFound` for a folder that holds no model.
    """
    for folder in (seed, *options.branches.values()):
        if not (folder / "config.json").is_file():
            raise NotFound(f"{folder} is not a folder of a model: it has no config.json")
    tokenizer, root = load_tokenizer(seed), _dense(seed)
    tables = {name: torch.from_numpy(table) for name, table in cut_by_domain(tokenizer, options.texts).items()}
    before = BaselineLosses.of(root, cut_by_domain(tokenizer, options.measure))
    specialists = {name: _dense(folder) for name, folder in options.branches.items()}
    with torch.inference_mode():
        made: Any = import_branches(root, specialists, tables, moe_layers=options.moe_layers, top_k=options.top_k)
    identity: Base = {"name": seed.name, "manifest": digests([seed / "config.json"])[0]}
    settings = {"branches": [*options.branches], "moe_layers": options.moe_layers, "top_k": options.top_k}
    source = ModelSource("branches", identity, settings=settings, losses=before.compare(made))
    return export_model(made, out, tokenizer, source)


def _dense(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
