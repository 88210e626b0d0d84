"""`connito select`: which experts a domain uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import JsonFlag, emit

if TYPE_CHECKING:
    from connito.moe.selection import Selection
    from connito.moe.statistics import RoutingStatistics


def select(
    base: Annotated[Path | None, typer.Option(help="Folder of the base model, with --data.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Text of the domain; may be repeated.")] = None,
    routing_trace: Annotated[Path | None, typer.Option(help="Recorded routing (.npz) instead of a model.")] = None,
    general: Annotated[list[Path] | None, typer.Option(help="General text, or traces of it, to compare with.")] = None,
    method: Annotated[str, typer.Option(help="esft-token, esft-gate, differential or des-moe.")] = "esft-token",
    threshold: Annotated[float | None, typer.Option(help="p of the method; each has its own default.")] = None,
    max_experts: Annotated[int, typer.Option(help="Cap over all layers; 0 is none.")] = 0,
    max_bytes: Annotated[int, typer.Option(help="Cap on the experts' bytes; 0 is none. Needs --base.")] = 0,
    num_experts: Annotated[int, typer.Option(help="Experts per layer, where a trace does not show it.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Select the experts that a domain's text uses, from a model and text or from a routing trace."""
    from connito.errors import Invalid

    if (routing_trace is None) == (base is None):
        raise Invalid("give either --base with --data, or --routing-trace")
    if base is not None and not data:
        raise Invalid("--base needs the domain's text: add --data FILE")
    if routing_trace is not None and max_bytes:
        raise Invalid(
            "--max-bytes needs the size of an expert, which a trace does not hold: use --max-experts, or --base"
        )
    options: dict[str, Any] = {"max_experts": max_experts, "max_bytes": max_bytes}
    if routing_trace is not None:
        target, others = _from_traces(routing_trace, general or [], num_experts)
    else:
        assert base is not None
        assert data is not None
        target, others = _from_text(base, data, general or [])
        options["expert_bytes"] = _expert_bytes(base) if max_bytes else 0
    chosen = _select(target, others, method, threshold, options)
    emit(as_json, chosen.to_json(), lambda: _text(chosen))


def _select(
    target: RoutingStatistics, others: dict[str, RoutingStatistics], method: str, threshold: float | None, options: Any
) -> Selection:
    from connito.moe.selection import select as choose

    return choose(target, method, threshold, general=others or None, **options)


def _from_traces(
    trace: Path, general: list[Path], num_experts: int
) -> tuple[RoutingStatistics, dict[str, RoutingStatistics]]:
    from connito.moe.statistics import read_trace

    return read_trace(_existing(trace), num_experts), {p.stem: read_trace(_existing(p), num_experts) for p in general}


def _from_text(
    base: Path, data: list[Path], general: list[Path]
) -> tuple[RoutingStatistics, dict[str, RoutingStatistics]]:
    """Route the text through the model. Imports torch."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.errors import NotFound
    from connito.moe.statistics import collect

    if not base.is_dir():
        raise NotFound(f"{base} is not a folder; give the folder of a base model, as `connito base build` makes it")
    texts = {path: _existing(path).read_text(errors="replace") for path in (*data, *general)}
    model, tokenizer = load_full(base), load_tokenizer(base)

    def route(*paths: Path) -> RoutingStatistics:
        import numpy as np

        ids = [i for path in paths for i in (*tokenizer(texts[path], verbose=False).input_ids, tokenizer.eos_token_id)]
        length = min(512, len(ids))
        return collect(model, np.asarray(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length))

    return route(*data), {path.stem: route(path) for path in general}


def _expert_bytes(base: Path) -> dict[int, int]:
    from connito.base.manifest import build_manifest

    return build_manifest(base).expert_bytes()


def _existing(path: Path) -> Path:
    from connito.errors import NotFound

    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    return path


def _text(chosen: Selection) -> str:
    lines = [f"{chosen.method} at p = {chosen.threshold:g}: {chosen.selected} of {chosen.total} experts"]
    lines.append(f"  {100 * chosen.mass:.1f} % of the domain's routing in the layers they are in")
    for layer, experts in sorted(chosen.layers.items()):
        scores = chosen.scores[layer]
        lines.append(f"  layer {layer:>3}: " + ", ".join(f"{e} ({scores[e]:.4f})" for e in experts))
    return "\n".join(lines)
