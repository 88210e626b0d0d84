"""`connito library`: experts beside the base's own, with routers of their own, and MoEs made of dense specialists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from connito.cli.library.experts import (
    BaseOption,
    DataOption,
    MeasureOption,
    OutOption,
    cut_sequences,
    digests,
    named_texts,
)
from connito.cli.output import JsonFlag, emit


def grow(
    name: Annotated[str, typer.Argument(help="What the addition is called.")],
    base: BaseOption,
    data: DataOption,
    anchor: Annotated[list[Path], typer.Option(help="Public text, the same for every contributor.")],
    out: Annotated[Path, typer.Option("--out", help="New file for the addition, safetensors.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 30,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    as_json: JsonFlag = False,
) -> None:
    """Train an expert with a router row of its own beside the base's, which stays as it is (FlexOlmo)."""
    import numpy as np

    from connito.base.loading import load_full, load_tokenizer
    from connito.experts import flex

    tokenizer = load_tokenizer(base)
    table = cut_sequences(tokenizer, data)
    size = min(4, len(table))
    batches = np.stack([np.take(table, range(size * i, size * (i + 1)), axis=0, mode="wrap") for i in range(steps)])
    made = flex.grow(
        load_full(base), name, batches, cut_sequences(tokenizer, anchor)[:, :-1], learning_rate=learning_rate
    )
    flex.save_addition(made, out)
    document = {"name": name, "digest": made.digest, "layers": sorted(made.rows), "file": str(out)}
    emit(as_json, document, lambda: f"{name}: one expert in each of {len(made.rows)} layers, written to {out}")


def join(
    additions: Annotated[list[Path], typer.Argument(help="Files of `library grow`; leave one out to opt it out.")],
    base: BaseOption,
    out: OutOption,
    measure: MeasureOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Put additions beside the base's experts: any set of them, in any order, with no training (FlexOlmo)."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.data.manifest import build_manifest
    from connito.experts import flex
    from connito.experts.export import export_model
    from connito.experts.measure import Before
    from connito.moe.layout import require_moe_layers

    model, tokenizer, manifest = load_full(base), load_tokenizer(base), build_manifest(base)
    texts = {name: cut_sequences(tokenizer, [path]) for name, path in named_texts(measure).items()}
    before = Before.of(model, texts)
    anchors = {index: list(range(layer.num_experts)) for index, layer in require_moe_layers(model).items()}
    members = [flex.load_addition(path) for path in additions]
    ids = flex.opt_in(model, members)
    settings = {
        "additions": [{"name": m.name, "digest": m.digest, "experts": ids[m.name]} for m in members],
        "anchor": {str(index): experts for index, experts in anchors.items()},
    }
    record = export_model(
        model, out, tokenizer, verb="join", base={"name": manifest.name, "manifest": manifest.digest}, keep={},
        settings=settings, measured={}, losses=before.compare(model),
    )  # fmt: skip
    emit(as_json, record, lambda: f"{len(members)} additions beside the base's experts, written to {out}")


def branches(
    seed: Annotated[Path, typer.Argument(help="Folder of the dense model that the branches were trained from.")],
    branch: Annotated[list[str], typer.Option("--branch", help="NAME=DIR: a dense specialist; may be repeated.")],
    text: Annotated[list[str], typer.Option("--text", help="NAME=FILE: text of a branch's domain, for the router.")],
    out: OutOption,
    moe_layers: Annotated[int, typer.Option(help="How many of the last layers get experts.")],
    top_k: Annotated[int, typer.Option(help="Experts a token uses.")] = 2,
    measure: MeasureOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make one MoE of dense specialists of one seed: their MLPs are its experts, the rest is averaged (BTX)."""
    import torch
    from transformers import AutoModelForCausalLM

    from connito.base.branches import import_branches
    from connito.base.loading import load_tokenizer
    from connito.errors import NotFound
    from connito.experts.export import export_model
    from connito.experts.measure import Before

    folders = named_texts(branch)
    for folder in (seed, *folders.values()):
        if not (folder / "config.json").is_file():
            raise NotFound(f"{folder} is not a folder of a model: it has no config.json")
    tokenizer = load_tokenizer(seed)
    tables = {name: torch.from_numpy(cut_sequences(tokenizer, [path])) for name, path in named_texts(text).items()}

    def dense(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    root = dense(seed)
    before = Before.of(root, {n: cut_sequences(tokenizer, [p]) for n, p in named_texts(measure).items()})
    specialists = {name: dense(folder) for name, folder in folders.items()}
    with torch.inference_mode():
        made: Any = import_branches(root, specialists, tables, moe_layers=moe_layers, top_k=top_k)
    identity = {"name": seed.name, "manifest": digests([seed / "config.json"])[0]}
    settings = {"branches": list(folders), "moe_layers": moe_layers, "top_k": top_k}
    record = export_model(
        made, out, tokenizer, verb="branches", base=identity, keep={}, settings=settings, measured={},
        losses=before.compare(made),
    )  # fmt: skip
    emit(as_json, record, lambda: f"an MoE of {len(folders)} branches, written to {out}")
