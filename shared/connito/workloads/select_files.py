"""`connito.select`: the experts that a domain's text uses, from files. Imports torch where there is text to route."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from connito.data.reading.texts import name_of
from connito.errors import Invalid
from connito.moe.budget import Budget, of_base
from connito.protocol.policy.choices import CONTESTED_RULE, METHOD, SCOPE
from connito.workloads.gather import Router, gather, recorded

if TYPE_CHECKING:
    from connito.moe.selection import Selection
    from connito.moe.statistics import RoutingStatistics

Progress = Callable[[str, float], None]
Files = Mapping[str, Sequence[Path]]
MEASURED_TOKENS = 1024


@dataclass(frozen=True)
class Caps:
    """Caps on a selection: number of experts, their bytes, bytes that training takes; 0 is none. `scope`: over all
    layers (global) or for each one (layer)."""

    max_experts: int = 0
    max_bytes: int = 0
    max_vram: int = 0
    scope: str = SCOPE


@dataclass(frozen=True)
class SelectOptions:
    """Options of `connito select`, under the same names.

    The routing comes from `base` with `data`, from a `routing_trace`, from saved `statistics`, or from `domains`, files by
    name, of which the first is the target and the others are selected together with it.
    """

    base: Path | None = None
    data: Sequence[Path] = ()
    routing_trace: Path | None = None
    statistics: Sequence[Path] = ()
    domains: Files = field(default_factory=dict)
    contested: str = CONTESTED_RULE
    general: Sequence[Path] = ()
    earlier: Sequence[Path] = ()
    method: str = METHOD
    threshold: float | None = None
    caps: Caps = field(default_factory=Caps)
    helpers: int = 0
    num_experts: int = 0
    diagnostics: bool = False
    effects: int = 16
    plots: Path | None = None
    save_statistics: Path | None = None

    def targets(self) -> Files:
        """Return the files by domain, the target first. Raises `Invalid` unless they come from one place."""
        if self.domains:
            if self.data or self.routing_trace or self.statistics:
                raise Invalid("--domain names every domain's files: leave out --data, --routing-trace and --statistics")
            return self.domains
        if self.base is not None and not self.data:
            if not self.statistics:
                raise Invalid("--base needs the domain's text: add --data FILE")
            return {"target": self.statistics}
        if (self.routing_trace is None and not self.statistics) == (self.base is None):
            raise Invalid("give either --base with --data, or --routing-trace, or --statistics")
        traces = [self.routing_trace] if self.routing_trace else []
        return {"target": [*self.data, *traces, *self.statistics]}


def select(options: SelectOptions, progress: Progress = lambda what, share: None) -> Selection:
    """Select the experts that a domain's text uses. Raises `Invalid` and `NotFound` with cause and remedy."""
    from connito.moe.selection import select_experts

    targets = options.targets()
    texts = _texts(targets)
    _check(options, texts)
    if options.save_statistics is not None:
        options.save_statistics.parent.mkdir(parents=True, exist_ok=True)
    general = {name_of(path): [path] for path in options.general}
    budget = _budget(options)
    to_route = [*texts.values(), *_texts(general).values()]
    router = Router.load(options.base, to_route) if options.base is not None and to_route else None

    def route(name: str, paths: list[Path]) -> RoutingStatistics:
        assert router is not None
        return router.route(paths, lambda share: progress(f"routing {name or 'text'}", share))

    number = options.num_experts
    found = gather(targets, route if router else None, number)
    others = gather(general, route if router else None, number)
    older = [part for path in options.earlier for part in gather({"": [path]}, None, number).values()]
    first, target = next(iter(found.items()))
    chosen = select_experts(
        target,
        options.method,
        options.threshold,
        general=others or None,
        beside={name: part for name, part in found.items() if name != first},
        contested=options.contested,
        earlier=older,
        budget=budget,
        helpers_per_layer=options.helpers,
        domain=first,
    )
    if options.diagnostics:
        assert router is not None
        chosen = _measured(chosen, router, next(iter(texts.values())), options.effects, progress)
    if router:
        read = {name: account.to_json() for name, account in router.accounts.items()}
        chosen = replace(chosen, diagnostics={**chosen.diagnostics, "read": read})
    _write(options, chosen, found, others)
    return chosen


def _texts(files: Files) -> dict[str, list[Path]]:
    """Return the files that have to be routed."""
    found = {name: [path for path in paths if not recorded(path)] for name, paths in files.items()}
    return {name: paths for name, paths in found.items() if paths}


def _check(options: SelectOptions, texts: Files) -> None:
    if options.base is None and (options.caps.max_bytes or options.caps.max_vram):
        name = "--max-bytes" if options.caps.max_bytes else "--max-vram"
        raise Invalid(f"{name} needs the size of an expert, which a trace does not hold: use --max-experts, or --base")
    if options.diagnostics and (options.base is None or not texts):
        raise Invalid(
            "--diagnostics runs the model: give --base with text, or leave it out (counts are always reported)"
        )


def _budget(options: SelectOptions) -> Budget:
    caps = options.caps
    budget = Budget(caps.max_experts, caps.max_bytes, caps.max_vram, caps.scope)
    if options.base is not None and (caps.max_bytes or caps.max_vram):
        from connito.base.checks import check_base

        layout = check_base(options.base)
        costs, resident = of_base(
            layout.expert_bytes,
            layout.bytes,
            {index: number for index, (number, _) in layout.experts.items()},
            value_bytes=layout.value_bytes,
            helpers_per_layer=options.helpers,
        )
        budget = replace(budget, costs=costs, resident=resident)
    budget.check()
    return budget


def _measured(chosen: Selection, router: Router, paths: Sequence[Path], effects: int, progress: Progress) -> Selection:
    from connito.moe.diagnostics import measure
    from connito.moe.lens import early_decoding

    rows = router.head(paths, MEASURED_TOKENS)
    # Selected experts first, then all others: a driver may be one that was not selected.
    everyone = {
        index: [*experts, *(e for e in range(len(chosen.scores[index])) if e not in set(experts))]
        for index, experts in chosen.layers.items()
    }
    found = measure(
        router.model,
        everyone,
        rows,
        budget=effects,
        max_tokens=MEASURED_TOKENS,
        progress=lambda done, of: progress("removing one expert at a time", done / of),
    )
    found["early_decoding"] = early_decoding(router.model, rows[:, :-1])
    return replace(chosen, diagnostics={**chosen.diagnostics, **found})


def _write(
    options: SelectOptions,
    chosen: Selection,
    found: Mapping[str, RoutingStatistics],
    others: Mapping[str, RoutingStatistics],
) -> None:
    for name, part in found.items() if options.save_statistics is not None else ():
        path = options.save_statistics
        assert path is not None
        target = path if len(found) == 1 else path.with_name(f"{path.stem}.{name}{path.suffix}")
        target.write_bytes(part.to_bytes())
    if options.plots is not None:
        from connito.moe.plots import write_plots

        write_plots(options.plots, chosen, {**found, **others})
