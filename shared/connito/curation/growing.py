"""`connito.library`: grow, join and branches: experts beside the base's own, and MoEs of dense models. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from connito.base import btm
from connito.base.branches import import_branches, train_routers
from connito.base.description import build_manifest
from connito.base.loading import load_full, load_tokenizer
from connito.curation.texts import cut_by_domain, cut_sequences, digests
from connito.errors import Invalid, NotFound
from connito.experts import flex
from connito.experts.export import ModelSource, export_model
from connito.experts.measure import BaselineLosses
from connito.library.derived import base_of
from connito.library.schema import Base, ExpertRecord
from connito.moe.device import device_of
from connito.moe.layout import require_moe_layers

# Sequences of a domain that say how likely it is.
PRIOR_ROWS = 16


@dataclass(frozen=True)
class GrowOptions:
    """Texts that an addition is trained on. `data`: the domain's text; `anchor`: public text, the same for every contributor."""

    data: Sequence[Path]
    anchor: Sequence[Path]
    steps: int = 30
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class BranchOptions:
    """Options for joining dense models. `branches`: folder by name; `texts`: text by name, for routers or the prior;
    `moe_layers`: how many of the last layers get experts, 0: none, one dense mean instead (BTM); `router_steps`: of training
    the routers, `steps`: of everything after that; `measure`: text by domain."""

    branches: Mapping[str, Path]
    texts: Mapping[str, Path]
    moe_layers: int
    top_k: int = 2
    router_steps: int = 0
    steps: int = 0
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


def join(
    additions: Sequence[Path],
    base: Path,
    out: Path,
    measure: Mapping[str, Path] | None = None,
    texts: Mapping[str, Path] | None = None,
    router_steps: int = 0,
) -> ExpertRecord:
    """Put additions beside the base's experts, in any order, into the new folder `out` (FlexOlmo); returns the record.

    `measure`: text by domain. With `texts`, a little of every domain, the routers are trained for `router_steps` once all
    experts are there (BAR); without, the model depends on the set of additions alone. One of them is upgraded by
    joining again with its new file: the others are as they were.
    """
    if bool(texts) != bool(router_steps):
        raise Invalid("routers are trained for --router-steps on --text of every domain: give both, or neither")
    model, tokenizer, manifest = load_full(base, device=device_of()), load_tokenizer(base), build_manifest(base)
    before = BaselineLosses.of(model, cut_by_domain(tokenizer, measure or {}))
    anchors = {str(index): list(range(layer.num_experts)) for index, layer in require_moe_layers(model).items()}
    members = [flex.load_addition(path) for path in additions]
    ids = flex.opt_in(model, members)
    added = [{"name": m.name, "digest": m.digest, "experts": ids[m.name]} for m in members]
    settings: dict[str, Any] = {"additions": added, "anchor": anchors}
    if texts:
        train_routers(model, _ids(cut_by_domain(tokenizer, texts)), router_steps)
        settings |= {"router_steps": router_steps, "texts": digests([*texts.values()])}
    source = ModelSource("join", base_of(manifest), settings=settings, losses=before.compare(model))
    return export_model(model, out, tokenizer, source)


def branches(seed: Path, out: Path, options: BranchOptions) -> ExpertRecord:
    """Make one model of dense specialists of one `seed`: an MoE whose experts are their MLPs (BTX), or their mean (BTM).

    Returns the record of the new folder `out`. Raises `NotFound` for a folder that holds no model.
    """
    for folder in (seed, *options.branches.values()):
        if not (folder / "config.json").is_file():
            raise NotFound(f"{folder} is not a folder of a model: it has no config.json")
    tokenizer, root = load_tokenizer(seed), _dense(seed)
    tables = _ids(cut_by_domain(tokenizer, options.texts))
    before = BaselineLosses.of(root, cut_by_domain(tokenizer, options.measure))
    specialists = {name: _dense(folder) for name, folder in options.branches.items()}
    settings: dict[str, Any] = {"branches": [*options.branches]}
    if options.moe_layers:
        made = _mixture(root, specialists, tables, options)
        settings |= {"moe_layers": options.moe_layers, "top_k": options.top_k, "router_steps": options.router_steps}
        settings |= {"steps": options.steps}
    else:
        made, found = _merged(specialists, tables, cut_by_domain(tokenizer, options.measure))
        settings |= {"dense": True, **found}
    identity: Base = {"name": seed.name, "manifest": digests([seed / "config.json"])[0]}
    source = ModelSource("branches", identity, settings=settings, losses=before.compare(made))
    return export_model(made, out, tokenizer, source)


def _mixture(
    root: Any, specialists: Mapping[str, Any], tables: Mapping[str, torch.Tensor], options: BranchOptions
) -> Any:
    with torch.no_grad():
        made = import_branches(root, specialists, tables, moe_layers=options.moe_layers, top_k=options.top_k)
    if options.router_steps:
        train_routers(made, tables, options.router_steps)
    if options.steps:
        train_routers(made, tables, options.steps, learning_rate=1e-4, everything=True)
    return made


def _merged(
    specialists: Mapping[str, Any], tables: Mapping[str, torch.Tensor], measure: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the specialists' weighted mean, with its weights and what their ensemble loses by domain."""
    models = list(specialists.values())
    rows = torch.cat([table[:PRIOR_ROWS] for _, table in sorted(tables.items())]).long()
    prior = btm.estimate_prior(btm.log_likelihoods(models, rows[torch.randperm(len(rows), generator=_draw())]))
    losses = {}
    for name, table in _ids(measure).items():
        log_p = btm.log_likelihoods(models, table.long())
        losses[name] = float(btm.ensemble_nll(log_p, prior).mean())
    weights = [float(share) for share in prior]
    return btm.average(specialists, weights), {"weights": weights, "ensemble": losses}


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _ids(tables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def _dense(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
