"""Cache of base models built on this machine: each is built once, completely or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from connito.data.manifest import Manifest
from connito.data.reading.texts import name_of, read_texts
from connito.errors import Invalid, NotFound
from connito.runtime.progress import Progress
from connito.runtime.settings import default_cache_dir

_MANIFEST = "manifest.json"
# What a base is made by: when one of these changes, an older base is not what this version would build.
_MAKERS = {
    "demo": ("connito.base.smollm", "connito.base.upcycle", "connito.base.checkpoint", "connito.data.domains"),
    "tiny": ("connito.base.tiny", "connito.base.upcycle", "connito.base.checkpoint"),
    "tiny-emo": ("connito.base.emo", "connito.base.tiny", "connito.base.upcycle", "connito.base.checkpoint"),
}


@dataclass(frozen=True)
class Recipe:
    """A recipe for a base. `source`: demo, tiny, tiny-emo, or the folder of a dense model; `data`: text files, one a domain.

    branches: (domain, folder) of dense models that were trained apart from `source`; with them, they are the experts.
    residual: the dense MLPs stay, and experts correct them.
    """

    source: str
    moe_layers: int = 6
    experts: int = 8
    top_k: int = 2
    seed: int = 0
    data: tuple[str, ...] = ()
    branches: tuple[tuple[str, str], ...] = ()
    router_steps: int = 0
    residual: bool = False


def cache_root() -> Path:
    """Return `CONNITO_CACHE_DIR`, or `connito` in the user's cache folder."""
    return Path(os.environ.get("CONNITO_CACHE_DIR") or default_cache_dir())


def cached_base(name: str) -> Path:
    """Return the folder of the base called `name` (demo, tiny or tiny-emo), built or not."""
    return cache_root() / "bases" / f"{name}-{source_digest(*_MAKERS[name])[:12]}"


def called(folder: Path) -> str:
    """Return what people call the base in `folder`: by its recipe where it was built here, else by the folder."""
    here = folder.resolve()
    return next((name for name in _MAKERS if here == (cached_base(name) / "model").resolve()), here.name)


def cached_manifest(name: str) -> Manifest:
    """Return the manifest of the base called `name`, which is built, as one built now has it. Raises `Invalid`."""
    return replace(Manifest.load(cached_base(name) / _MANIFEST), name=name, named=False)


def is_whole(name: str) -> bool:
    """Return whether the base called `name` is built, and every file of it is as it was then."""
    from connito.store.cache import digest_of_file

    target = cached_base(name)
    try:
        files = Manifest.load(target / _MANIFEST).files.values()
        return all(digest_of_file(target / "model" / one.name) == (one.digest, one.size) for one in files)
    except (OSError, Invalid):
        return False


def source_digest(*modules: str) -> str:
    """Return hex SHA-256 over the source of `modules`, without importing them."""
    state = hashlib.sha256()
    for module in modules:
        spec = find_spec(module)
        assert spec is not None, f"no module is called {module}"
        assert spec.origin is not None, f"{module} is not a file"
        state.update(Path(spec.origin).read_bytes())
    return state.hexdigest()


@contextmanager
def fresh_folder(target: Path, is_sound: Callable[[], bool] = lambda: True) -> Iterator[Path | None]:
    """Yield a folder that becomes `target` when the block ends without an error; None when `target` exists and is sound.

    One process at a time; others wait. A process that is killed leaves a draft that the next one removes.
    """
    draft = target.with_name(f"{target.name}.draft")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{target.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                if is_sound():
                    yield None
                    return
                shutil.rmtree(target)  # What links to its files verifies them itself.
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            try:
                yield draft
                draft.rename(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        remedy = "make that folder writable and free space there, or set CONNITO_CACHE_DIR"
        raise Invalid(f"cannot write {target}: {error.strerror}; {remedy}") from error


def build_base(recipe: Recipe, out: Path, progress: Progress) -> None:
    """Make a base in the new folder `out`. Imports torch. Raises `Invalid` when the folder exists, or the model or the
    text will not do."""
    if out.exists():
        raise Invalid(f"{out} exists; choose another --out, or remove it")
    with fresh_folder(out) as draft:
        assert draft is not None
        _build(recipe, draft, progress)


def build_cached(name: str, progress: Progress) -> Path:
    """Return the base of that name, built if this machine has none yet or a damaged one, with its manifest beside the weights.
    Imports torch.
    """
    from connito.base.description import build_manifest

    target = cached_base(name)
    with fresh_folder(target, partial(is_whole, name)) as draft:
        if draft is not None:
            _build(Recipe(name), draft / "model", progress)
            (draft / _MANIFEST).write_bytes(build_manifest(draft / "model", name, progress).to_bytes())
            for path in (draft / "model").iterdir():
                path.chmod(0o444)  # Caches link to it.
    return target


def _build(recipe: Recipe, out: Path, progress: Progress) -> None:
    if recipe.residual and (recipe.branches or recipe.source in _MAKERS):
        raise Invalid("--residual is for a dense model that is turned into experts: give --from DIR, and no --branch")
    if recipe.source == "tiny":
        from connito.base.tiny import build_tiny

        build_tiny(out, recipe.seed, progress=progress)
        return
    if recipe.source == "tiny-emo":
        from connito.base.emo import build_tiny_emo

        build_tiny_emo(out, recipe.seed, progress=progress)
        return
    if recipe.branches:
        _join_branches(recipe, out, progress)
        return
    shape = {"moe_layers": recipe.moe_layers, "experts": recipe.experts, "top_k": recipe.top_k, "seed": recipe.seed}
    if recipe.source == "demo":
        from connito.base.smollm import build_demo_base

        build_demo_base(out, _texts(recipe), progress, **shape)
        return
    _upcycle_folder(Path(recipe.source), out, _texts(recipe), shape, progress, residual=recipe.residual)


def _join_branches(recipe: Recipe, out: Path, progress: Progress) -> None:
    """Join branches as in BTX: their MLPs become experts, other weights their mean, routers their texts' centroids."""
    from connito.base.branches import import_branches, train_routers
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_full, load_tokenizer
    from connito.base.smollm import probe_blocks

    folders = {"the seed model, --from": recipe.source, **dict(recipe.branches)}
    for name, folder in folders.items():
        if not (Path(folder) / "config.json").is_file():
            raise NotFound(f"{folder} ({name}) is not the folder of a model in the Hugging Face layout")
    named, given = sorted(dict(recipe.branches)), sorted(map(name_of, recipe.data))
    if named != given:
        raise Invalid(
            f"the branches are {', '.join(named)}, but there is text for {', '.join(given) or 'none'}: give --data NAME.txt for "
            "each --branch NAME=DIR, which its router is made from"
        )
    tokenizer = load_tokenizer(Path(recipe.source))
    probe, _ = probe_blocks(tokenizer, _texts(recipe))
    progress("reading the branches", 0.0)
    branches = {name: load_full(Path(folder)) for name, folder in recipe.branches}
    model = import_branches(
        load_full(Path(recipe.source)), branches, probe, moe_layers=recipe.moe_layers, top_k=recipe.top_k
    )
    progress("reading the branches", 1.0)
    if recipe.router_steps:
        train_routers(model, probe, recipe.router_steps, seed=recipe.seed)
    card = {
        "built_from": Path(recipe.source).name,
        "branches": ", ".join(branches),
        "router": f"centroids, then {recipe.router_steps} steps" if recipe.router_steps else "centroids",
    }
    save_checkpoint(model, out, tokenizer, card, lambda share: progress("writing the base", share))


def _upcycle_folder(
    source: Path,
    out: Path,
    texts: dict[str, Iterable[str]],
    shape: dict[str, int],
    progress: Progress,
    *,
    residual: bool,
) -> None:
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_full, load_tokenizer
    from connito.base.residual import as_residual
    from connito.base.smollm import probe_blocks
    from connito.base.upcycle import upcycle

    if not source.is_dir():
        raise NotFound(
            f"{source} is not a folder; give demo, tiny, tiny-emo, or the folder of a dense model (Hugging Face layout)"
        )
    tokenizer = load_tokenizer(source)
    probe, held = probe_blocks(tokenizer, texts)
    made = upcycle(load_full(source), probe, held, progress=progress, **shape).model
    made = as_residual(made) if residual else made
    card = {"built_from": source.name, "clustered_on": ", ".join(sorted(texts))}
    card |= {"residual": "experts correct the dense MLP"} if residual else {}
    save_checkpoint(made, out, tokenizer, card, lambda share: progress("writing the base", share))


def _texts(recipe: Recipe) -> dict[str, Iterable[str]]:
    """Return documents by domain for the routers. Held-out documents are left out: nothing may be made with them."""
    from connito.data.prepare import Split, part_of

    found: dict[str, Iterable[str]]
    if recipe.data:
        found = {name_of(location): read_texts([location]) for location in recipe.data}
    else:
        from connito.data.domains import DEMO_DOMAINS, load_domain

        found = {domain: load_domain(domain, 120_000) for domain in DEMO_DOMAINS}
    split = Split()

    def shown(texts: Iterable[str]) -> Iterator[str]:
        return (text for text in texts if part_of(text.strip(), split) != "holdout")

    return {domain: shown(texts) for domain, texts in found.items()}
