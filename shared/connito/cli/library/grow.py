"""`connito library`: grow, join and branches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.library.options import (
    BaseOption,
    DataOption,
    MeasureOption,
    OutOption,
    named_files,
)
from connito.cli.output import DeviceOption, JsonFlag, emit
from connito.render import formats


def grow(
    name: Annotated[str, typer.Argument(help="Name of the addition.")],
    base: BaseOption,
    data: DataOption,
    anchor: Annotated[list[Path], typer.Option(help="Public text, the same for every contributor.")],
    out: Annotated[Path, typer.Option("--out", help="New file for the addition, safetensors.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 30,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Train an expert with a router row of its own beside the base's, which stays as it is (FlexOlmo)."""
    from connito.curation import growing

    made = growing.grow(name, base, out, growing.GrowOptions(tuple(data), tuple(anchor), steps, learning_rate))
    document = {"name": name, "digest": made.digest, "layers": sorted(made.rows), "file": str(out)}
    emit(
        as_json,
        document,
        lambda: f"{name}: one expert in each of {formats.count(len(made.rows), 'layer')}, written to {out}",
    )


def join(
    additions: Annotated[list[Path], typer.Argument(help="Files of `library grow`; leave one out to opt it out.")],
    base: BaseOption,
    out: OutOption,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="NAME=FILE: a little text of a domain, to train the routers on.")
    ] = None,
    router_steps: Annotated[int, typer.Option(min=0, help="Steps of training for the routers, experts frozen.")] = 0,
    measure: MeasureOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Put additions beside the base's experts: any set of them, in any order (FlexOlmo); routers may be trained then (BAR)."""
    from connito.curation import growing

    record = growing.join(additions, base, out, named_files(measure), named_files(text), router_steps)
    emit(
        as_json,
        record,
        lambda: f"{formats.count(len(additions), 'addition')} beside the base's experts, written to {out}",
    )


def branches(
    seed: Annotated[Path, typer.Argument(help="Folder of the dense model that the branches were trained from.")],
    branch: Annotated[list[str], typer.Option("--branch", help="NAME=DIR: a dense specialist; may be repeated.")],
    text: Annotated[list[str], typer.Option("--text", help="NAME=FILE: text of a branch's domain, for the router.")],
    out: OutOption,
    moe_layers: Annotated[
        int, typer.Option(min=0, help="How many of the last layers get experts; 0: none, one dense mean instead (BTM).")
    ],
    top_k: Annotated[int, typer.Option(help="Experts a token uses.")] = 2,
    router_steps: Annotated[int, typer.Option(min=0, help="Steps of training for the routers alone.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of training for everything, after that.")] = 0,
    measure: MeasureOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make one model of dense specialists of one seed: an MoE whose experts are their MLPs (BTX), or their mean (BTM)."""
    from connito.curation import growing

    options = growing.BranchOptions(
        named_files(branch), named_files(text), moe_layers, top_k, router_steps, steps, named_files(measure)
    )
    record = growing.branches(seed, out, options)
    what = "an MoE" if moe_layers else "the mean"
    emit(as_json, record, lambda: f"{what} of {formats.count(len(options.branches), 'branch')}, written to {out}")
