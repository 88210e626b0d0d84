"""`connito library`: smaller models: experts left out, made smaller, extracted for a domain, or skipped as they run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.library.experts import (
    AcceptOption,
    BaseOption,
    DataOption,
    MeasureOption,
    OutOption,
    ShelfOption,
    cut_sequences,
    digests,
    find_expert,
    halves,
    meter,
    named_texts,
    now_iso,
    permit,
    viewer_of,
)
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats

if TYPE_CHECKING:
    from connito.experts.measure import Before
    from connito.library.governance import Permission

DomainOption = Annotated[str, typer.Option("--domain", help="What the texts are; the first file's name if left out.")]
WithOption = Annotated[
    list[str] | None, typer.Option("--with", help="Put this expert into the base first; may be repeated.")
]


def prune(
    base: BaseOption,
    data: DataOption,
    out: OutOption,
    method: Annotated[
        str,
        typer.Option(
            help="naee, router-weighted, moe-i2, task (halving, to one expert), zeros (MoE-Pruner), low-rank (MoE-I²)."
        ),
    ] = "naee",
    max_experts: Annotated[int, typer.Option(help="Experts that may stay, over all layers.")] = 0,
    max_bytes: Annotated[int, typer.Option(help="Bytes of expert tensors that may stay.")] = 0,
    dense: Annotated[
        bool, typer.Option(help="With task: write the last expert of each layer as a dense model.")
    ] = False,
    share: Annotated[
        float, typer.Option(help="With zeros and low-rank: share of the experts' numbers that may stay.")
    ] = 0.5,
    domain: DomainOption = "",
    within: WithOption = None,
    measure: MeasureOption = None,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Leave experts out of a base model under a budget; writes a checkpoint that transformers loads."""
    from connito.errors import Invalid

    whole = method in ("task", "zeros", "low-rank")
    if not (max_experts or max_bytes or whole):
        raise Invalid("how small? give --max-experts or --max-bytes")
    source = _source(base, within, domain, data, measure, accept_license, shelf, data_dir)
    if method in ("zeros", "low-rank"):
        record = _thin(source, out, method, share)
    else:
        record = _prune(source, out, method, max_experts, max_bytes, dense)
    emit(as_json, record, lambda: _model_text(record, out))


def extract(
    base: BaseOption,
    data: DataOption,
    out: OutOption,
    margin: Annotated[float, typer.Option(help="Nats per token that the domain's loss may rise by.")] = 0.02,
    per_layer: Annotated[
        int, typer.Option(help="Exactly this many experts a layer; 0: the fewest within the margin.")
    ] = 0,
    accept_loss: Annotated[bool, typer.Option("--accept-loss", help="Write it even if it loses more.")] = False,
    domain: DomainOption = "",
    within: WithOption = None,
    measure: MeasureOption = None,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Extract the smallest set of experts that speaks a domain, with its measured loss beside the full model's."""
    from connito.experts import extraction

    source = _source(base, within, domain, data, measure, accept_license, shelf, data_dir)
    found = extraction.extract_domain(
        source.model, source.text, source.held_out, margin=margin, per_layer=per_layer, accept_loss=accept_loss
    )
    settings = {"margin": margin, "per_layer": per_layer, "tried": found.tried, "data": digests(data)}
    measured = {"full": found.full_loss, "pruned": found.loss}
    record = _export_pruned("extract", source, out, found.keep, settings, measured)
    emit(as_json, record, lambda: _model_text(record, out))


def skip(
    base: BaseOption,
    data: DataOption,
    beta: Annotated[
        float, typer.Option(help="Skip experts below this share of a token's largest gate weight; -1: calibrated.")
    ] = -1.0,
    as_json: JsonFlag = False,
) -> None:
    """Skip light experts at inference (NAEE β): the calibrated β of each layer, what is skipped, and what it costs."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.experts import prune as pruning

    model, tokenizer = load_full(base), load_tokenizer(base)
    text, held_out = halves(cut_sequences(tokenizer, data))
    found = pruning.skip_thresholds(model, text[:, :-1])
    betas = found if beta < 0 else dict.fromkeys(found, beta)
    full = pruning.loss(model, held_out)
    with pruning.skipping(model, betas) as skipped:
        loss = pruning.loss(model, held_out)
    document = {
        "betas": {str(index): value for index, value in betas.items()},
        "skipped_share": skipped.share,
        "measured": {"full": full, "skipping": loss},
    }
    losses = f"loss {loss:.4f}, full {full:.4f} ({loss - full:+.4f} nats per token)"
    emit(as_json, document, lambda: f"{formats.percent(skipped.share)} of the slots skipped; {losses}")


@dataclass
class _Source:
    """The model to shrink: the base with experts in it, and the texts for calibration and measurement."""

    base: Path
    model: Any
    tokenizer: Any
    text: Any
    held_out: Any
    data: list[Path]
    domain: str
    parents: list[dict[str, Any]]
    permission: Permission | None
    before: Before


def _source(
    base: Path, within: list[str] | None, domain: str, data: list[Path], measure: list[str] | None,
    accept_license: list[str] | None, shelf: Path | None, data_dir: Path | None,
) -> _Source:  # fmt: skip
    from connito.base.loading import load_full, load_tokenizer
    from connito.experts.load import load_expert
    from connito.experts.measure import Before
    from connito.library.governance import Use

    model, tokenizer = load_full(base), load_tokenizer(base)
    found = [find_expert(name, shelf, data_dir) for name in within or []]
    permission = None
    if found:
        use = Use("prune", accepted=frozenset(accept_license or []))
        permission = permit(found, use, viewer_of("", None), shelf, data_dir, allow_yanked=False)
    for folder, _ in found:
        load_expert(model, folder)
    parents = [record for _, record in found]
    name = domain or "+".join(sorted({str(record["domain"]) for record in parents})) or data[0].stem
    text, held_out = halves(cut_sequences(tokenizer, data))
    texts = {name: held_out, **{n: cut_sequences(tokenizer, [p]) for n, p in named_texts(measure).items()}}
    meter(parents, "prune", "", shelf, data_dir)
    return _Source(base, model, tokenizer, text, held_out, data, name, parents, permission, Before.of(model, texts))


def _prune(source: _Source, out: Path, method: str, max_experts: int, max_bytes: int, dense: bool) -> dict[str, Any]:
    import copy

    from connito.experts import prune as pruning
    from connito.experts.extraction import equalise, ranking
    from connito.moe.statistics import collect

    model = source.model
    settings: dict[str, Any] = {
        "method": method,
        "max_experts": max_experts,
        "max_bytes": max_bytes,
        "data": digests(source.data),
    }
    if method == "task":
        keep, settings["history"] = pruning.progressive(copy.deepcopy(model), source.text)
    else:
        chosen = pruning.choose(model, source.text, method, max_experts=max_experts, max_bytes=max_bytes)
        keep, padding = equalise(chosen, ranking(collect(model, source.text[:, :-1])))
        settings["padding"] = {str(index): experts for index, experts in padding.items() if experts}
    measured = {"full": pruning.loss(model, source.held_out)}
    with pruning.masked(model, keep):
        measured["pruned"] = pruning.loss(model, source.held_out)
    return _export_pruned("prune", source, out, keep, settings, measured, dense=dense)


def _thin(source: _Source, out: Path, method: str, share: float) -> dict[str, Any]:
    """Keep every expert and make it smaller."""
    from connito.experts import prune as pruning
    from connito.experts.lowrank import low_rank, sparsify
    from connito.moe.layout import require_moe_layers

    model, extra = source.model, {}
    measured = {"full": pruning.loss(model, source.held_out)}
    settings: dict[str, Any] = {"method": method, "share": share, "data": digests(source.data), "tuned": True}
    if method == "zeros":
        settings["zeros"] = {str(i): zeros for i, zeros in sparsify(model, source.text[:, :-1], 1 - share).items()}
    else:
        extra["factors.safetensors"], ranks = low_rank(model, source.text[:, :-1], share)
        settings["ranks"] = {str(index): chosen for index, chosen in ranks.items()}
    measured["pruned"] = pruning.loss(model, source.held_out)
    keep = {index: list(range(layer.num_experts)) for index, layer in require_moe_layers(model).items()}
    return _export_pruned("prune", source, out, keep, settings, measured, extra=extra)


def _export_pruned(
    verb: str, source: _Source, out: Path, keep: dict[int, list[int]], settings: dict[str, Any],
    measured: dict[str, float], *, dense: bool = False, extra: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    from connito.data.manifest import build_manifest
    from connito.experts.export import export_model, to_dense
    from connito.experts.prune import prune as shrink
    from connito.moe.layout import require_moe_layers

    manifest = build_manifest(source.base)
    total = sum(layer.num_experts for layer in require_moe_layers(source.model).values())
    model: Any = shrink(source.model, keep)
    if dense:
        model, settings, keep = to_dense(model), {**settings, "dense": True, "experts": keep}, {}
    return export_model(
        model, out, source.tokenizer, verb=verb, base={"name": manifest.name, "manifest": manifest.digest}, keep=keep,
        settings=settings, measured=measured, losses=source.before.compare(model), domain=source.domain, total=total,
        parents=source.parents, license=source.permission.license if source.permission else "", created=now_iso(),
        extra=extra or {},
    )  # fmt: skip


def _model_text(record: dict[str, Any], out: Path) -> str:
    full, small = record["measured"]["full"], record["measured"]["pruned"]
    kept = sum(map(len, record["experts"].values()))
    what = f"{kept} experts" if kept else "a dense model"
    return f"{what}, written to {out}\n  loss {small:.4f}, full model {full:.4f} ({small - full:+.4f} nats per token)"
