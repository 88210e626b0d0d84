"""`connito select`: which experts a domain uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connito.cli.library.options import base_option
from connito.cli.output import DeviceOption, JsonFlag, emit
from connito.data.reading.rows import Account
from connito.protocol.policy.choices import CONTESTED, CONTESTED_RULE, METHOD, METHODS, SCOPE, one_of
from connito.render import formats

if TYPE_CHECKING:
    from connito.moe.selection import Selection


def select(
    base: Annotated[Path | None, base_option("Base model that routes the text.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Data of the domain: file, folder, glob or address. Needs --base.")
    ] = None,
    routing_trace: Annotated[Path | None, typer.Option(help="Recorded routing (.npz) instead of a model.")] = None,
    statistics: Annotated[
        list[Path] | None, typer.Option(help="Saved statistics of the domain; several are merged exactly.")
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="NAME=FILE: one of several domains to select together; text, trace or statistics."
        ),
    ] = None,
    contested: Annotated[
        str, typer.Option(help=f"Who gets an expert that several domains chose: {one_of(CONTESTED)}.")
    ] = CONTESTED_RULE,
    general: Annotated[
        list[Path] | None, typer.Option(help="General text, traces or statistics, to compare with.")
    ] = None,
    earlier: Annotated[
        list[Path] | None, typer.Option(help="des-moe: older statistics, oldest first, for the running mean.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{one_of(METHODS)}.")] = METHOD,
    threshold: Annotated[float | None, typer.Option(help="p of the method; each has its own default.")] = None,
    max_experts: Annotated[int, typer.Option(help="Cap on their number; 0 is none.")] = 0,
    max_bytes: Annotated[int, typer.Option(help="Cap on the experts' bytes; 0 is none. Needs --base.")] = 0,
    max_vram: Annotated[
        int, typer.Option(help="Cap on the bytes that training takes, without activations; 0 is none. Needs --base.")
    ] = 0,
    scope: Annotated[str, typer.Option(help="Caps hold over all layers (global) or for each one (layer).")] = SCOPE,
    helpers: Annotated[int, typer.Option(help="Frozen experts to keep beside the targets of each layer.")] = 0,
    num_experts: Annotated[int, typer.Option(help="Experts per layer, where a trace does not show it.")] = 0,
    diagnostics: Annotated[
        bool, typer.Option(help="Also measure causal effects, the top-1 ratio and early decoding; needs --base.")
    ] = False,
    effects: Annotated[int, typer.Option(help="Maximum number of causal effects, one forward pass each; 0: all.")] = 16,
    plots: Annotated[Path | None, typer.Option(help="Folder for the diagnostics as pictures (SVG).")] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(help="Write the domain's statistics here, for --statistics; several domains: one file each."),
    ] = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Select the experts that a domain's text uses, from a model and text, a routing trace or saved statistics."""
    from connito.local.display import choose_display
    from connito.workloads.select_files import Caps, SelectOptions, select

    options = SelectOptions(
        base=base, data=tuple(data or ()), routing_trace=routing_trace, statistics=tuple(statistics or ()),
        domains=_by_domain(domain or []), contested=contested, general=tuple(general or ()),
        earlier=tuple(earlier or ()), method=method, threshold=threshold,
        caps=Caps(max_experts, max_bytes, max_vram, scope), helpers=helpers, num_experts=num_experts,
        diagnostics=diagnostics, effects=effects, plots=plots, save_statistics=save_statistics,
    )  # fmt: skip
    with choose_display(as_json=as_json) as display:
        chosen = select(options, display.progress)
    emit(as_json, chosen.to_json(), lambda: _text(chosen))


def _by_domain(entries: list[str]) -> dict[str, list[Path]]:
    """Read NAME=FILE entries; a name may come several times. Raises `Invalid` for what is none."""
    from connito.errors import Invalid

    found: dict[str, list[Path]] = {}
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise Invalid(f"--domain {entry!r} is not NAME=FILE; write for example --domain medical=notes.txt")
        found.setdefault(name, []).append(Path(file))
    return found


def _text(chosen: Selection) -> str:
    seen = chosen.diagnostics
    lines = [
        f"{chosen.method} at p = {chosen.threshold:g}: {chosen.selected} of {formats.count(chosen.total, 'expert')}"
    ]
    lines.append(f"  {formats.percent(chosen.mass)} of the domain's routing in the layers they are in")
    for layer, experts in sorted(chosen.layers.items()):
        scores = chosen.scores[layer]
        lines.append(f"  layer {layer:>3}: " + ", ".join(f"{e} ({scores[e]:.4f})" for e in experts))
    for name, layers in chosen.domains.items():
        lines.append(f"  {name}: {formats.count(sum(map(len, layers.values())), 'expert')}")
    for conflict in seen.get("conflicts", []):
        wanted = ", ".join(f"{name} {score:.4f}" for name, score in conflict["scores"].items())
        to = " and ".join(conflict["to"])
        lines.append(
            f"  layer {conflict['layer']:>3} expert {conflict['expert']}: wanted by {wanted}; {seen['contested']}: {to}"
        )
    for pair, share in seen.get("overlap", {}).items():
        lines.append(f"  {' and '.join(pair.split('|'))} have {formats.percent(share)} of their routing in common")
    for name, numbers in seen.get("read", {}).items():
        lines.append(f"  {name}: {Account.from_json(numbers)}")
    if "causal_effect" in seen:
        drivers = ", ".join(f"{layer}/{expert}" for layer, expert in seen["drivers"])
        lines.append(f"  drivers (layer/expert whose removal changes the output most): {drivers}")
        lines.append(f"  perplexity with each token's first expert alone: × {seen['top1_perplexity_ratio']:.3f}")
    return "\n".join(lines)
