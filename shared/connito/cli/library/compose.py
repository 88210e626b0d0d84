"""`connito library`: compose, remove, upgrade, cluster and route."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connito.cli.library.options import (
    AcceptOption,
    AsOption,
    BaseOption,
    CommercialFlag,
    DataOption,
    MeasureOption,
    OrganisationOption,
    OutOption,
    ShelfOption,
    YankedFlag,
    agreement,
    holdings,
    named_files,
    obligations,
)
from connito.cli.output import DataDirOption, DeviceOption, JsonFlag, emit, table
from connito.render import formats

if TYPE_CHECKING:
    from connito.curation.composing import Composed


def compose(
    experts: Annotated[list[str], typer.Argument(help="Expert ids or folders.")],
    base: BaseOption,
    out: OutOption,
    method: Annotated[str, typer.Option(help="linear, sum or ties.")] = "linear",
    weight: Annotated[list[float] | None, typer.Option(help="One per expert, in their order.")] = None,
    learn: Annotated[list[Path] | None, typer.Option(help="Learn the weights on these texts (LoRAHub).")] = None,
    density: Annotated[float, typer.Option(help="Share of each expert's changes that ties keeps.")] = 1.0,
    measure: MeasureOption = None,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    accept_license: AcceptOption = None,
    commercial: CommercialFlag = False,
    allow_yanked: YankedFlag = False,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Merge several experts of one base into one, with its lineage; conflicts are reported."""
    from connito.curation import composing

    options = composing.ComposeOptions(
        method, tuple(weight or ()), tuple(learn or ()), density, named_files(measure),
        agreement(accept_license, commercial, allow_yanked=allow_yanked),
    )  # fmt: skip
    done = composing.compose(experts, base, out, options, holdings(shelf, data_dir, who, organisation))
    emit(as_json, done.record, lambda: _composed(done, out))


def remove(
    composition: Annotated[str, typer.Argument(help="A composed expert.")],
    expert: Annotated[str, typer.Argument(help="The expert to remove from it.")],
    base: BaseOption,
    out: OutOption,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Compose again without one of the parents, exactly as if it had never been added."""
    from connito.curation import composing

    done = composing.remove(composition, expert, base, out, agreement(accept_license), holdings(shelf, data_dir))
    emit(as_json, done.record, lambda: _composed(done, out))


def upgrade(
    composition: Annotated[str, typer.Argument(help="A composed expert.")],
    old: Annotated[str, typer.Argument(help="The expert in it that is replaced.")],
    new: Annotated[str, typer.Argument(help="The expert that takes its place.")],
    base: BaseOption,
    data: DataOption,
    out: OutOption,
    others: Annotated[
        list[str] | None, typer.Option("--other", help="NAME=FILE: this domain may not lose; may be repeated.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Nats per token that any other domain may lose.")] = 0.01,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Replace one expert of a composition (BAR); the others keep their digests, and no other domain may lose."""
    from connito.curation import composing

    options = composing.UpgradeOptions(tuple(data), named_files(others), margin, agreement(accept_license))
    done = composing.upgrade(composition, old, new, base, out, options, holdings(shelf, data_dir))
    emit(as_json, done.record, lambda: _composed(done, out))


def cluster(
    experts: Annotated[list[str], typer.Argument(help="Expert ids or folders.")],
    base: BaseOption,
    count: Annotated[int, typer.Option(help="How many clusters.")],
    out: Annotated[Path | None, typer.Option("--out", help="New folder: one expert a cluster.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="NAME=FILE: text of an expert's domain, to train each cluster on."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="With --text: steps of training for each cluster.")] = 60,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Group experts whose changes are alike (MBC); merge each group, or train an expert for it on its members' texts."""
    from connito.curation import composing

    made = composing.cluster(
        experts, base, count, out, agreement(accept_license), holdings(shelf, data_dir), named_files(text), steps
    )
    document = {
        "clusters": made.clusters, "similarity": made.similarity, "experts": made.experts,
        "written": [{"folder": str(folder), "expert_id": name} for folder, name in made.written],
    }  # fmt: skip
    lines = [f"{number}: {', '.join(names)}" for number, names in enumerate(made.clusters)]
    lines += [f"  {name}, written to {folder}" for folder, name in made.written]
    emit(as_json, document, lambda: "\n".join(lines))


def route(
    experts: Annotated[list[str], typer.Argument(help="Expert ids or folders: variants that tokens choose among.")],
    base: BaseOption,
    measure: Annotated[list[str], typer.Option("--measure", help="NAME=FILE: text to measure on; may be repeated.")],
    method: Annotated[
        str, typer.Option(help="arrow (prototypes), molora (a trained router), uniform, or one-hot:N.")
    ] = "arrow",
    top_k: Annotated[int, typer.Option(help="With arrow: variants a token may mix; 0 for all.")] = 1,
    train: Annotated[list[Path] | None, typer.Option(help="With molora: text that the router is trained on.")] = None,
    steps: Annotated[int, typer.Option(help="With molora: steps of training.")] = 40,
    out: Annotated[Path | None, typer.Option("--out", help="New file for the routing, safetensors.")] = None,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Keep several variants of experts side by side and choose token by token; print the loss beside each single variant's."""
    from connito.curation import composing

    options = composing.RouteOptions(
        named_files(measure), method, top_k, tuple(train or ()), steps, agreement(accept_license)
    )
    losses = composing.route(experts, base, options, out, holdings(shelf, data_dir))
    document = {"method": method, "losses": losses, "written": str(out or "")}
    emit(as_json, document, lambda: _losses_text(losses))


def _losses_text(losses: dict[str, dict[str, float]]) -> str:
    domains = list(next(iter(losses.values())))
    return table(("variant", *domains), [(name, *(row[d] for d in domains)) for name, row in losses.items()])


def _composed(done: Composed, out: Path) -> str:
    record = done.record
    derived = record["derived"]
    lines = [f"{record['expert_id']}: {formats.count(record['selection']['selected'], 'expert')}, written to {out}"]
    lines += [f"  {parent['expert_id']} with weight {parent['weight']:g}" for parent in derived["parents"]]
    for conflict in derived["settings"]["conflicts"]:
        lines.append(
            f"  layer {conflict['layer']} expert {conflict['expert']}: {' and '.join(conflict['names'])} both change it, "
            f"cosine {conflict['cosine']:+.3f}, signs agree on {formats.percent(conflict['sign_agreement'], 0)}"
        )
    for row in record["losses"]:
        if row["before"] is not None and row["after"] is not None and "change_low" in row:
            interval = f"{row['change_low']:+.4f} to {row['change_high']:+.4f}"
            change = f"{row['after'] - row['before']:+.4f}, {interval}; {formats.count(row['tokens'], 'token')}"
            lines.append(f"  {row['domain']}: {row['before']:.4f} → {row['after']:.4f} nats per token ({change})")
    return "\n".join([*lines, *obligations(done.permission)])
