"""`connito select`: which experts a domain uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import JsonFlag, emit
from connito.protocol.policy.choices import CONTESTED, CONTESTED_RULE, METHOD, METHODS, SCOPE, one_of
from connito.render import formats

if TYPE_CHECKING:
    from connito.local.display import Display
    from connito.moe.budget import Budget
    from connito.moe.selection import Selection
    from connito.moe.statistics import RoutingStatistics
    from connito.workloads.gather import Router

Files = dict[str, list[Path]]
MEASURED_TOKENS = 1024


def select(
    base: Annotated[Path | None, typer.Option(help="Folder of the base model that routes the text.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Text of the domain; may be repeated. Needs --base.")] = None,
    routing_trace: Annotated[Path | None, typer.Option(help="Recorded routing (.npz) instead of a model.")] = None,
    statistics: Annotated[
        list[Path] | None, typer.Option(help="Saved statistics of the domain; several are merged exactly.")
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="A domain of several that are selected together; text, trace or statistics."
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
        bool, typer.Option(help="Also measure causal effects and the top-1 ratio; needs --base and text.")
    ] = False,
    effects: Annotated[int, typer.Option(help="At most so many causal effects, one forward pass each; 0: all.")] = 16,
    plots: Annotated[Path | None, typer.Option(help="Folder for the diagnostics as pictures (SVG).")] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(help="Write the domain's statistics here, for --statistics; several domains: one file each."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Select the experts that a domain's text uses, from a model and text, a routing trace or saved statistics."""
    from connito.local.display import choose_display
    from connito.moe.selection import select_experts as choose
    from connito.workloads.gather import gather

    asked = _asked(base, data or [], routing_trace, statistics or [], domain or [], num_experts)
    _check(asked, diagnostics, max_bytes, max_vram)
    if save_statistics is not None:
        save_statistics.parent.mkdir(parents=True, exist_ok=True)
    general_files: Files = {path.stem: [path] for path in general or []}
    with choose_display(as_json=as_json) as display:
        budget = _budget(base, max_experts, max_bytes, max_vram, scope, helpers)
        router = _router(asked, general_files)
        route = None if router is None else _routing(router, display)
        found = gather(asked.domains, route, num_experts)
        others = gather(general_files, route, num_experts)
        older = [part for path in earlier or [] for part in gather({"": [path]}, None, num_experts).values()]
        first, target = next(iter(found.items()))
        chosen = choose(
            target,
            method,
            threshold,
            general=others or None,
            beside={name: part for name, part in found.items() if name != first},
            contested=contested,
            earlier=older,
            budget=budget,
            helpers_per_layer=helpers,
            domain=first,
        )
        if diagnostics:
            assert router is not None
            chosen = _measured(chosen, router, asked, effects, display)
    if save_statistics is not None:
        _save(save_statistics, found)
    if plots is not None:
        from connito.moe.plots import write_plots

        write_plots(plots, chosen, {**found, **others})
    emit(as_json, chosen.to_json(), lambda: _text(chosen))


@dataclass(frozen=True)
class _Asked:
    """Sources of the routing statistics by domain, the target first."""

    base: Path | None
    domains: Files

    def texts(self) -> Files:
        """Return the files that have to be routed."""
        from connito.workloads.gather import recorded

        found = {name: [path for path in paths if not recorded(path)] for name, paths in self.domains.items()}
        return {name: paths for name, paths in found.items() if paths}


def _asked(
    base: Path | None, data: list[Path], trace: Path | None, statistics: list[Path], named: list[str], num_experts: int
) -> _Asked:
    from connito.errors import Invalid

    if named:
        if data or trace or statistics:
            raise Invalid("--domain names every domain's files: leave out --data, --routing-trace and --statistics")
        return _Asked(base, _named(named))
    if base is not None and not data:
        if not statistics:
            raise Invalid("--base needs the domain's text: add --data FILE")
        return _Asked(base, {"target": statistics})
    if (trace is None and not statistics) == (base is None):
        raise Invalid("give either --base with --data, or --routing-trace, or --statistics")
    return _Asked(base, {"target": [*data, *([trace] if trace else []), *statistics]})


def _named(named: list[str]) -> Files:
    from connito.errors import Invalid

    found: Files = {}
    for entry in named:
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise Invalid(f"--domain {entry!r} is not NAME=FILE; write for example --domain medical=notes.txt")
        found.setdefault(name, []).append(Path(file))
    return found


def _check(asked: _Asked, diagnostics: bool, max_bytes: int, max_vram: int) -> None:
    from connito.errors import Invalid

    if asked.base is None and (max_bytes or max_vram):
        name = "--max-bytes" if max_bytes else "--max-vram"
        raise Invalid(f"{name} needs the size of an expert, which a trace does not hold: use --max-experts, or --base")
    if diagnostics and (asked.base is None or not asked.texts()):
        raise Invalid(
            "--diagnostics runs the model: give --base with text, or leave it out (counts are always reported)"
        )


def _budget(base: Path | None, experts: int, size: int, vram: int, scope: str, helpers: int) -> Budget:
    from connito.moe.budget import Budget, of_base

    budget = Budget(experts, size, vram, scope)
    if base is not None and (size or vram):
        from connito.base.checks import check_base
        from connito.data.manifest import expert_sizes, headers_of

        layout, sizes = check_base(base), expert_sizes(headers_of(base))
        costs, resident = of_base(
            sizes,
            layout.bytes,
            {index: number for index, (number, _) in layout.experts.items()},
            value_bytes=layout.value_bytes,
            helpers_per_layer=helpers,
        )
        budget = replace(budget, costs=costs, resident=resident)
    budget.check()
    return budget


def _router(asked: _Asked, general: Files) -> Router | None:
    """Return the loaded base, when there is text to route. Imports torch."""
    from connito.workloads.gather import Router, recorded

    texts = [*asked.texts().values(), *([p for p in paths if not recorded(p)] for paths in general.values())]
    texts = [paths for paths in texts if paths]
    return Router.load(asked.base, texts) if asked.base is not None and texts else None


def _routing(router: Router, display: Display) -> Any:
    def route(name: str, paths: list[Path]) -> RoutingStatistics:
        return router.route(paths, lambda share: display.progress(f"routing {name or 'text'}", share))

    return route


def _measured(chosen: Selection, router: Router, asked: _Asked, effects: int, display: Display) -> Selection:
    from connito.moe.diagnostics import measure

    paths = next(iter(asked.texts().values()))
    found = measure(
        router.model,
        chosen.layers,
        router.head(paths, MEASURED_TOKENS),
        budget=effects,
        max_tokens=MEASURED_TOKENS,
        progress=lambda done, of: display.progress("removing one expert at a time", done / of),
    )
    return replace(chosen, diagnostics={**chosen.diagnostics, **found})


def _save(path: Path, found: dict[str, RoutingStatistics]) -> None:
    for name, part in found.items():
        target = path if len(found) == 1 else path.with_name(f"{path.stem}.{name}{path.suffix}")
        target.write_bytes(part.to_bytes())


def _text(chosen: Selection) -> str:
    seen = chosen.diagnostics
    lines = [f"{chosen.method} at p = {chosen.threshold:g}: {chosen.selected} of {chosen.total} experts"]
    lines.append(f"  {formats.percent(chosen.mass)} of the domain's routing in the layers they are in")
    for layer, experts in sorted(chosen.layers.items()):
        scores = chosen.scores[layer]
        lines.append(f"  layer {layer:>3}: " + ", ".join(f"{e} ({scores[e]:.4f})" for e in experts))
    for name, layers in chosen.domains.items():
        lines.append(f"  {name}: {sum(map(len, layers.values()))} experts")
    for conflict in seen.get("conflicts", []):
        wanted = ", ".join(f"{name} {score:.4f}" for name, score in conflict["scores"].items())
        to = " and ".join(conflict["to"])
        lines.append(
            f"  layer {conflict['layer']:>3} expert {conflict['expert']}: wanted by {wanted}; {seen['contested']}: {to}"
        )
    for pair, share in seen.get("overlap", {}).items():
        lines.append(f"  {' and '.join(pair.split('|'))} have {formats.percent(share)} of their routing in common")
    if "causal_effect" in seen:
        drivers = ", ".join(f"{layer}/{expert}" for layer, expert in seen["drivers"])
        lines.append(f"  drivers (layer/expert whose removal changes the output most): {drivers}")
        lines.append(f"  perplexity with each token's first expert alone: × {seen['top1_perplexity_ratio']:.3f}")
    return "\n".join(lines)
