"""`connito.library`: prune, extract, skip and steer: experts left out, made smaller, or weighted anew. Needs torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.base.description import build_manifest
from connito.base.loading import load_full, load_tokenizer
from connito.curation.holdings import Agreement, Holdings
from connito.curation.texts import cut_by_domain, cut_sequences, digests, halves, now_iso
from connito.errors import Invalid
from connito.experts import prune as pruning
from connito.experts.choose import choose, expert_costs
from connito.experts.dense import check_dense, to_dense
from connito.experts.export import ModelSource, export_model
from connito.experts.extraction import extract_domain
from connito.experts.load import load_expert
from connito.experts.lowrank import low_rank, sparsify
from connito.experts.measure import BaselineLosses, loss
from connito.experts.steering import Steered, steer_drivers
from connito.experts.token_skipping import experts_choose, skip_thresholds, skipping
from connito.experts.tuning import distil, recover, tune_for_task
from connito.library.derived import base_of
from connito.library.schema import Base, ExpertRecord
from connito.moe.device import device_of
from connito.moe.layout import require_moe_layers
from connito.moe.rows import read_rows, write_rows
from connito.render import formats
from connito.runtime.progress import tell

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

WITHOUT_BUDGET = ("task", "zeros", "low-rank")


@dataclass(frozen=True)
class ShrinkSource:
    """The model to shrink: a base with the experts `within` put in; `data`: text that decides and measures, of `domain`
    (the experts', else the first file's name, if left out); `measure`: text of other domains to measure on."""

    base: Path
    data: Sequence[Path]
    domain: str = ""
    within: Sequence[str | Path] = ()
    measure: Mapping[str, Path] = field(default_factory=dict)
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class PruneOptions:
    """naee, router-weighted and moe-i2 under `max_experts` or `max_bytes`; task, to one expert a layer, which `dense`
    writes as a dense model; zeros and low-rank keep every expert and a `share` of its numbers (half, if left out), moe-i2
    with a `share` of those that stay. `steps` of training on the text: for task spread over its windows, for zeros
    distilled from the full model, for low rank of the factors by LoRA."""

    method: str = "naee"
    max_experts: int = 0
    max_bytes: int = 0
    dense: bool = False
    share: float | None = None
    steps: int = 0


@dataclass(frozen=True)
class ExtractOptions:
    """`margin`: nats per token that the domain's loss may rise by; `per_layer`: exactly so many experts, 0: the fewest
    within the margin; `accept_loss`: write it even if it loses more."""

    margin: float = 0.02
    per_layer: int = 0
    accept_loss: bool = False


@dataclass(frozen=True)
class Skipping:
    """β by layer, the share of slots that is skipped, and nats per token without and with it."""

    betas: dict[int, float]
    share: float
    full: float
    loss: float


def prune(
    source: ShrinkSource, out: Path, options: PruneOptions | None = None, library: Holdings | None = None
) -> ExpertRecord:
    """Leave experts out under a budget; writes a checkpoint that transformers loads, and returns its record."""
    options = options or PruneOptions()
    if not (options.max_experts or options.max_bytes or options.method in WITHOUT_BUDGET):
        raise Invalid("pruning needs a size: give --max-experts or --max-bytes")
    loaded = _load(source, library or Holdings())
    if options.dense:
        check_dense(loaded.model)
    return _thin(loaded, out, options) if options.method in ("zeros", "low-rank") else _prune(loaded, out, options)


def extract(
    source: ShrinkSource, out: Path, options: ExtractOptions | None = None, library: Holdings | None = None
) -> ExpertRecord:
    """Extract the smallest set of experts that speaks a domain, with its measured loss; returns the record."""
    options = options or ExtractOptions()
    loaded = _load(source, library or Holdings())
    found = extract_domain(loaded.model, loaded.text, loaded.held_out, **vars(options))
    settings = {
        "margin": options.margin, "per_layer": options.per_layer, "tried": found.tried, "data": digests(source.data),
    }  # fmt: skip
    measured = {"full": found.full_loss, "pruned": found.loss}
    return _export(loaded, out, ModelSource("extract", _UNNAMED, found.keep, settings, measured))


def steer(base: Path, data: Sequence[Path], count: int = 8, factor: float = 0.0) -> Steered:
    """Give more weight to the `count` experts that drive the output most on a domain's text, by `factor` or the best of a
    few. Returns the drivers and what it saves on the text's other half."""
    model, tokenizer = load_full(base, device=device_of()), load_tokenizer(base)
    text, held_out = halves(cut_sequences(tokenizer, data))
    tell("trying factors")
    return steer_drivers(model, text, held_out, count=count, factor=factor)


def skip(base: Path, data: Sequence[Path], beta: float | None = None, capacity: float = 0.0) -> Skipping:
    """Skip light experts at inference (NAEE): those below `beta` of a token's largest gate weight, calibrated by layer
    without one; or, with a `capacity`, let experts choose their tokens (Expert Choice). Returns what is skipped and what it
    costs."""
    model, tokenizer = load_full(base, device=device_of()), load_tokenizer(base)
    text, held_out = halves(cut_sequences(tokenizer, data))
    if capacity:
        full = loss(model, held_out)
        with experts_choose(model, capacity) as skipped:
            return Skipping({}, skipped.share, full, loss(model, held_out))
    tell("finding thresholds")
    found = skip_thresholds(model, text[:, :-1])
    betas = found if beta is None else dict.fromkeys(found, beta)
    full = loss(model, held_out)
    with skipping(model, betas) as skipped:
        light = loss(model, held_out)
    return Skipping(dict(betas), skipped.share, full, light)


# `_export` names the base.
_UNNAMED: Base = {"name": "", "manifest": ""}


@dataclass
class _Loaded:
    """The model with the experts in it, the texts that decide and measure, and the losses before."""

    source: ShrinkSource
    model: Any
    tokenizer: Any
    text: npt.NDArray[Any]
    held_out: npt.NDArray[Any]
    domain: str
    parents: list[ExpertRecord]
    license: str
    before: BaselineLosses


def _load(source: ShrinkSource, library: Holdings) -> _Loaded:
    found = [library.find(str(name)) for name in source.within]
    license_ = library.permit(found, "prune", source.agreement).license if found else ""
    model, tokenizer = load_full(source.base, device=device_of()), load_tokenizer(source.base)
    for folder, _ in found:
        load_expert(model, folder)
    parents = [record for _, record in found]
    name = source.domain or "+".join(sorted({str(record["domain"]) for record in parents})) or source.data[0].stem
    text, held_out = halves(cut_sequences(tokenizer, source.data))
    before = BaselineLosses.of(model, {name: held_out, **cut_by_domain(tokenizer, source.measure)})
    library.meter(parents, "prune")
    return _Loaded(source, model, tokenizer, text, held_out, name, parents, license_, before)


def _prune(loaded: _Loaded, out: Path, options: PruneOptions) -> ExpertRecord:
    model, budget = loaded.model, {"max_experts": options.max_experts, "max_bytes": options.max_bytes}
    settings: dict[str, Any] = {"method": options.method, **budget, "data": digests(loaded.source.data)}
    # Before anything is trained: what is tuned stands in the model afterwards.
    measured = {"full": loss(model, loaded.held_out)}
    tell(
        "choosing the experts that stay"
        if not options.steps
        else f"training for {formats.count(options.steps, 'step')}, and choosing"
    )
    if options.method == "task":
        keep = _for_task(loaded, options.steps, settings)
    else:
        keep = choose(model, loaded.text, options.method, **budget, even=True)
    extra: dict[str, Mapping[str, torch.Tensor]] = {}
    if options.method == "moe-i2" and options.share is not None:
        extra["factors.safetensors"] = _shorten(loaded, keep, options, settings)
    tell("measuring what is left")
    with pruning.masked(model, keep):
        measured["pruned"] = loss(model, loaded.held_out)
    return _export(loaded, out, ModelSource("prune", _UNNAMED, keep, settings, measured), extra, dense=options.dense)


def _for_task(loaded: _Loaded, steps: int, settings: dict[str, Any]) -> pruning.Keep:
    """Return the experts left for the task; with `steps`, their trained rows are in the model afterwards."""
    small = copy.deepcopy(loaded.model)
    if not steps:
        keep, settings["history"] = pruning.progressive(small, loaded.text)
        return keep
    keep, settings["history"] = tune_for_task(small, loaded.text, loaded.text, steps)
    settings |= {"steps": steps, "tuned": True}
    _put(loaded.model, keep, small)
    return keep


def _shorten(
    loaded: _Loaded, keep: pruning.Keep, options: PruneOptions, settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Give the experts that stay low-rank maps, of ranks by what each one's absence costs; returns the factors (MoE-I²)."""
    small = pruning.prune(copy.deepcopy(loaded.model), keep)
    factors = _factors(small, loaded, options, settings, expert_costs(small, loaded.text))
    settings |= {"share": options.share, "tuned": True}
    _put(loaded.model, keep, small)
    return factors


def _factors(
    model: Any,
    loaded: _Loaded,
    options: PruneOptions,
    settings: dict[str, Any],
    costs: Mapping[int, Sequence[float]] | None = None,
) -> dict[str, torch.Tensor]:
    factors, ranks = low_rank(model, loaded.text[:, :-1], _share(options), costs)
    settings["ranks"] = {str(index): chosen for index, chosen in ranks.items()}
    if options.steps:
        recover(model, factors, loaded.text, options.steps)
        settings["steps"] = options.steps
    return factors


def _share(options: PruneOptions) -> float:
    return 0.5 if options.share is None else options.share


def _put(model: Any, keep: pruning.Keep, small: Any) -> None:
    """Write the experts of the pruned model `small` into the places that they have in `model`."""
    write_rows(model, keep, read_rows(small, {index: range(len(experts)) for index, experts in keep.items()}))


def _thin(loaded: _Loaded, out: Path, options: PruneOptions) -> ExpertRecord:
    """Make every expert smaller; all of them stay."""
    model, extra = loaded.model, dict[str, Mapping[str, "torch.Tensor"]]()
    measured = {"full": loss(model, loaded.held_out)}
    method, text = options.method, loaded.text[:, :-1]
    tell("making every expert smaller")
    share = _share(options)
    teacher = copy.deepcopy(model) if method == "zeros" and options.steps else None
    settings: dict[str, Any] = {"method": method, "share": share, "data": digests(loaded.source.data), "tuned": True}
    if method == "zeros":
        settings["zeros"] = {str(i): zeros for i, zeros in sparsify(model, text, 1 - share).items()}
        if teacher is not None:
            distil(model, teacher, loaded.text, options.steps)
            settings["steps"] = options.steps
    else:
        extra["factors.safetensors"] = _factors(model, loaded, options, settings)
    measured["pruned"] = loss(model, loaded.held_out)
    keep = {index: list(range(layer.num_experts)) for index, layer in require_moe_layers(model).items()}
    return _export(loaded, out, ModelSource("prune", _UNNAMED, keep, settings, measured), extra)


def _export(
    loaded: _Loaded,
    out: Path,
    source: ModelSource,
    extra: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    *,
    dense: bool = False,
) -> ExpertRecord:
    """Write what `source.keep` leaves of the model; everything else that the record says follows from `loaded`."""
    manifest = build_manifest(loaded.source.base)
    total = sum(layer.num_experts for layer in require_moe_layers(loaded.model).values())
    model: Any = pruning.prune(loaded.model, source.keep)
    if dense:
        settings = {**source.settings, "dense": True, "experts": source.keep}
        model, source = to_dense(model), replace(source, settings=settings, keep={})
    source = replace(
        source, base=base_of(manifest, loaded.parents), losses=loaded.before.compare(model),
        domain=loaded.domain, total=total, parents=loaded.parents, license=loaded.license, created=now_iso(),
    )  # fmt: skip
    return export_model(model, out, loaded.tokenizer, source, extra)
