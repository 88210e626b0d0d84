"""`connito library`: prune, extract, skip and steer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connito.cli.library.options import (
    AcceptOption,
    BaseOption,
    DataOption,
    MeasureOption,
    OutOption,
    ShelfOption,
    agreement,
    holdings,
    named_files,
)
from connito.cli.output import DataDirOption, DeviceOption, JsonFlag, emit
from connito.library.schema import ExpertRecord
from connito.render import formats

DomainOption = Annotated[
    str, typer.Option("--domain", help="Name of the texts' domain; by default the first file's name.")
]
WithOption = Annotated[
    list[str] | None, typer.Option("--with", help="Put this expert into the base first; may be repeated.")
]


def prune(
    base: BaseOption,
    data: DataOption,
    out: OutOption,
    method: Annotated[
        str,
        typer.Option(help="naee, router-weighted, moe-i2, task (to one expert a layer), zeros (MoE-Pruner), low-rank."),
    ] = "naee",
    max_experts: Annotated[int, typer.Option(help="Experts that may stay, over all layers.")] = 0,
    max_bytes: Annotated[int, typer.Option(help="Bytes of expert tensors that may stay.")] = 0,
    dense: Annotated[
        bool, typer.Option(help="With task: write the last expert of each layer as a dense model.")
    ] = False,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of the experts' numbers, what may stay: by default half with zeros and low-rank, all with moe-i2."
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps of training: task tunes what is left, zeros distils from the full model, low rank learns by LoRA.",
        ),
    ] = 0,
    domain: DomainOption = "",
    within: WithOption = None,
    measure: MeasureOption = None,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Leave experts out of a base model under a budget; writes a checkpoint that transformers loads."""
    from connito.curation import shrinking

    source = shrinking.ShrinkSource(
        base, tuple(data), domain, tuple(within or ()), named_files(measure), agreement(accept_license)
    )
    options = shrinking.PruneOptions(method, max_experts, max_bytes, dense, share, steps)
    record = shrinking.prune(source, out, options, holdings(shelf, data_dir))
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
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Extract the smallest set of experts that serves a domain, with its measured loss beside the full model's."""
    from connito.curation import shrinking

    source = shrinking.ShrinkSource(
        base, tuple(data), domain, tuple(within or ()), named_files(measure), agreement(accept_license)
    )
    options = shrinking.ExtractOptions(margin, per_layer, accept_loss)
    record = shrinking.extract(source, out, options, holdings(shelf, data_dir))
    emit(as_json, record, lambda: _model_text(record, out))


def skip(
    base: BaseOption,
    data: DataOption,
    beta: Annotated[
        float, typer.Option(help="Skip experts below this share of a token's largest gate weight; -1: calibrated.")
    ] = -1.0,
    capacity: Annotated[
        float, typer.Option(min=0, help="Let experts choose their tokens instead, so many a token on average; 0: not.")
    ] = 0.0,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Skip light experts at inference: print each layer's β (NAEE), or let experts choose (Expert Choice); and the loss added."""
    from connito.curation import shrinking

    found = shrinking.skip(base, data, None if beta < 0 else beta, capacity)
    document = {
        "betas": {str(index): value for index, value in found.betas.items()},
        "skipped_share": found.share,
        "measured": {"full": found.full, "skipping": found.loss},
    }
    cost = f"loss {found.loss:.4f}, full {found.full:.4f} ({found.loss - found.full:+.4f} nats per token)"
    emit(as_json, document, lambda: f"{formats.percent(found.share)} of the slots skipped; {cost}")


def steer(
    base: BaseOption,
    data: DataOption,
    count: Annotated[int, typer.Option(min=1, help="How many experts, of all layers, count as drivers.")] = 8,
    factor: Annotated[
        float, typer.Option(min=0, help="What their gate weights are multiplied by; 0: the best of a few.")
    ] = 0.0,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Give more weight to the experts that drive the output on a domain's text: print them, the factor, and what it saves."""
    from connito.curation import shrinking

    found = shrinking.steer(base, data, count, factor)
    document = {
        "drivers": {str(index): experts for index, experts in found.drivers.items()},
        "factor": found.factor,
        "measured": {"full": found.full, "steered": found.loss},
    }
    cost = f"loss {found.loss:.4f}, as it is {found.full:.4f} ({found.loss - found.full:+.4f} nats per token)"
    emit(as_json, document, lambda: f"drivers {found.drivers}, weights times {found.factor:g}; {cost}")


def _model_text(record: ExpertRecord, out: Path) -> str:
    full, small = record["measured"]["full"], record["measured"]["pruned"]
    kept = sum(map(len, record["experts"].values()))
    what = formats.count(kept, "expert") if kept else "a dense model"
    return f"{what}, written to {out}\n  loss {small:.4f}, full model {full:.4f} ({small - full:+.4f} nats per token)"
