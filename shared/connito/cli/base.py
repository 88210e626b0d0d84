"""`connito base`: make, register and look at base models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.library.options import base_folder
from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats

if TYPE_CHECKING:
    from connito.data.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Base models: build, import, show.")


@app.command("build")
def build(
    source: Annotated[
        str, typer.Option("--from", metavar="MODEL", help="demo, tiny, tiny-emo, or the folder of a dense model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    moe_layers: Annotated[int, typer.Option(help="How many of the last layers get experts.")] = 6,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that each token uses.")] = 2,
    data: Annotated[
        list[Path] | None, typer.Option(help="Text for the routers, one file a domain [the demo's domains].")
    ] = None,
    branch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="NAME=DIR: a dense model trained from the same seed, to become one expert; may be repeated.",
        ),
    ] = None,
    router_steps: Annotated[int, typer.Option(help="With --branch: steps of training for the routers.")] = 0,
    residual: Annotated[
        bool, typer.Option("--residual", help="Keep the dense MLPs; experts start as corrections of them.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the clustering.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Turn a dense model into a Mixture-of-Experts with the same function, whose routers tell domains apart; or join dense
    branches of one seed into one, an expert each."""
    from connito.base import folders
    from connito.base.recipes import Recipe, build_base
    from connito.local.display import choose_display

    branches = tuple(_branch(entry) for entry in branch or [])
    recipe = Recipe(
        source, moe_layers, experts, top_k, seed, tuple(map(str, data or [])), branches, router_steps, residual
    )
    with choose_display(as_json=as_json) as display:
        build_base(recipe, out.absolute(), display.progress)
    manifest = folders.show(out)
    emit(as_json, _document(out, manifest), lambda: _text(out, manifest))


def _branch(entry: str) -> tuple[str, str]:
    from connito.errors import Invalid

    name, _, folder = entry.partition("=")
    if not (name and folder):
        raise Invalid(f"--branch {entry!r} is not NAME=DIR; write for example --branch medical=models/medical")
    return name, folder


@app.command("show")
def show(
    folder: Annotated[
        Path, typer.Argument(parser=base_folder, metavar="DIR|NAME", help="Folder of a base model; or demo, tiny.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Show a base model's layers, experts, bytes and digest."""
    from connito.base import folders
    from connito.base.recipes import called

    manifest = folders.show(folder, called(folder))
    emit(as_json, _document(folder, manifest), lambda: _text(folder, manifest))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder of a base model in the Hugging Face layout.")],
    name: Annotated[str, typer.Option(help="Its name [the folder's].")] = "",
    rewrite: Annotated[
        Path | None, typer.Option(help="Write the model here with fused experts first; for other ways of storing them.")
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Put a base model and its manifest into the platform's store; a RunSpec names it by the manifest's digest."""
    from connito.base import folders

    if rewrite is not None:
        folders.rewrite(folder, rewrite)
        name, folder = name or folder.name, rewrite
    manifest, ref = folders.import_(folder, data_dir, name)
    reference = {"digest": ref.digest, "size": ref.size, "media_type": ref.media_type}
    document = {**_document(folder, manifest), "manifest": reference}
    emit(as_json, document, lambda: f"{manifest.name} is in the store; manifest {ref.digest}")


def _document(folder: Path, manifest: Manifest) -> dict[str, Any]:
    from connito.base.folders import left_alone

    sizes = manifest.expert_bytes()
    return {
        "name": manifest.name,
        "folder": str(folder),
        "digest": manifest.digest,
        "bytes": manifest.size,
        "quantised": manifest.quantised,
        "experts": {str(layer): count for layer, count in manifest.experts().items()},
        "expert_bytes": {str(layer): count for layer, count in sizes.items()},
        "files": {name: entry.digest for name, entry in sorted(manifest.files.items())},
        "left_alone": dict(zip(("files", "tensors"), left_alone(folder, manifest), strict=True)),
    }


def _text(folder: Path, manifest: Manifest) -> str:
    from connito.base.folders import left_alone

    experts, sizes = manifest.experts(), manifest.expert_bytes()
    stored = f", {manifest.quantised}" if manifest.quantised else ""
    lines = [f"{manifest.name} in {folder}: {formats.size(manifest.size)}{stored}, digest {manifest.digest}"]
    lines += [
        f"  layer {layer:>3}: {formats.count(count, 'expert')} of {formats.size(sizes[layer])}"
        for layer, count in experts.items()
    ]
    for what, names in zip(("files", "tensors"), left_alone(folder, manifest), strict=True):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {what} that are not part of it: {', '.join(names[:3])}{more}")
    return "\n".join(lines)
