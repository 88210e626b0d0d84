"""Find the files of a folder that are the checkpoint: what its index names, or the one file of weights, and side files.

Whatever else lies beside (older shards, a publisher's own format, adapters, logs, keys, notes) is neither read nor uploaded.
No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connito.data.documents import parse_json
from connito.data.tensors import STORED_BITS, TensorEntry, read_header
from connito.errors import Invalid, NotFound
from connito.files import plain_name
from connito.v1 import reasons_pb2

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
SIDE_FILES = ("config.json", "generation_config.json", "connito_base.json", INDEX, *TOKENIZER_FILES)
_SERIES = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
# Files that are weights of something else by their name alone.
_FOREIGN = re.compile(r"^(adapter_|consolidated|optimizer|scheduler|training_args)")
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_JSON = 1 << 26
# What the format's own library reads at most.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Header:
    """A tensor as its file's header describes it. `start`: of its bytes in the file; `length`: in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint by name, those with weights in the order in which they are read.

    `index`: tensor -> file where there is an index; `stated`: what the index says of the whole (its metadata); `ignored`:
    what lies beside and is left alone.
    """

    where: str
    paths: Mapping[str, Path]
    weights: tuple[str, ...]
    index: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def pickled(self) -> bool:
        """Return whether the weights are in PyTorch's own format, which has no byte ranges."""
        return self.weights[0].endswith(".bin")

    def side(self) -> dict[str, Path]:
        """Return the files without weights."""
        return {name: path for name, path in self.paths.items() if name not in self.weights}


def find_checkpoint(source: Path | Mapping[str, Path]) -> CheckpointFiles:
    """Return the files of the checkpoint in a folder, or among files by name.

    Raises `NotFound` or `Invalid`, with cause and remedy, for a folder that is none, lacks a part of its weights, or leaves
    open which of its files they are.
    """
    where, there = _listed(source)
    if "config.json" not in there:
        raise NotFound(f"{where} has no config.json{_instead(where, there)}")
    for name in ("config.json", *(name for name in SIDE_FILES if name in there)):
        _not_a_pointer(there[name], where)
    weights, index, stated = _weights(where, there)
    for name in weights:
        _not_a_pointer(there[name], where)
    kept = {name: there[name] for name in sorted({*weights, *(n for n in SIDE_FILES if n in there)})}
    if INDEX in kept and not index:
        del kept[INDEX]
    return CheckpointFiles(where, kept, weights, index, stated, tuple(sorted(set(there) - set(kept))))


def read_headers(files: CheckpointFiles) -> dict[str, Header]:
    """Return every tensor of the weights by name, from the headers alone.

    Raises `Invalid` for a damaged header, a file that was cut, a tensor in two files, or one that the index names and its
    file lacks.
    """
    found: dict[str, Header] = {}
    for file in files.weights:
        try:
            header = read_header(files.paths[file], max_header_bytes=_MAX_HEADER, widths=STORED_BITS)
        except Invalid as error:
            raise Invalid(
                f"{file} in {files.where} is damaged or incomplete: {error}; copy it again",
                reason=reasons_pb2.REASON_BAD_HEADER,
            ) from error
        for name, entry in header.entries.items():
            if name in found:
                raise _invalid(
                    f"{name} is in both {found[name].file} and {file} of {files.where}: remove the file that is stale, or "
                    "fetch the checkpoint again into an empty folder"
                )
            found[name] = _header(file, entry, header.data_start)
    lost = next((name for name, file in files.index.items() if name not in found or found[name].file != file), None)
    if lost is not None:
        raise _invalid(
            f"the index of {files.where} says that {lost} is in {files.index[lost]}, which does not hold it: index and "
            "shards belong to different checkpoints; fetch both again into an empty folder"
        )
    return found


def _header(file: str, entry: TensorEntry, data: int) -> Header:
    return Header(file, entry.dtype, entry.shape, data + entry.start, entry.stop - entry.start)


def _listed(source: Path | Mapping[str, Path]) -> tuple[str, dict[str, Path]]:
    if not isinstance(source, Path):
        return "the base", dict(source)
    if source.is_file():
        raise NotFound(f"{source} is a file; give the folder of the model that it belongs to, {source.parent}")
    if not source.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None
        raise NotFound(
            f"there is no folder {source}; "
            + (
                f"to use a model of a hub, download it first (`hf download {source} --local-dir DIR`) and give DIR"
                if hub
                else "give the folder of a base model, as `connito base build` makes it"
            )
        )
    return str(source), {path.name: path for path in source.iterdir() if path.is_file()} | _broken(source)


def _broken(folder: Path) -> dict[str, Path]:
    """Return links to files that are not there: a cache whose download is still running."""
    return {path.name: path for path in folder.iterdir() if path.is_symlink() and not path.exists()}


def _instead(where: str, there: Mapping[str, Path]) -> str:
    """Return what a folder without config.json is, and what to give instead."""
    inside = sorted(path.parent for path in Path(where).glob("*/config.json"))
    if inside:
        named = (
            f"the model is in {inside[0]}" if len(inside) == 1 else f"models are in {', '.join(map(str, inside[:3]))}"
        )
        return f", and {named}: name that folder" if len(inside) == 1 else f", and {named}: name one of these folders"
    snapshots = Path(where) / "snapshots"
    if snapshots.is_dir():
        reference = Path(where) / "refs" / "main"
        known = [path.name for path in sorted(snapshots.iterdir()) if path.is_dir()]
        main = reference.read_text().strip() if reference.is_file() else ""
        snapshot = snapshots / (main if main in known else "".join(known[:1]))
        return f": it is a hub's cache of a model; give the snapshot in it, {snapshot}"
    if "adapter_config.json" in there:
        return ": it holds an adapter, not a model; merge it into its base (peft: `merge_and_unload`) and save that"
    foreign = next((name for name in sorted(there) if name.endswith((".gguf", ".pth", ".pt"))), None)
    if foreign:
        return f": its weights are {foreign}, another format; give a checkpoint in the Hugging Face layout"
    return ": it is not a checkpoint in the Hugging Face layout; save the model with `save_pretrained`"


def _not_a_pointer(path: Path, where: str) -> None:
    if not path.exists():
        raise NotFound(f"{path.name} in {where} is a link to a file that is not there: fetch the checkpoint again")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise NotFound(
                f"{path.name} in {where} is a Git-LFS pointer, not the file itself: run `git lfs install && git lfs pull` "
                "in that folder"
            )


def _weights(where: str, there: Mapping[str, Path]) -> tuple[tuple[str, ...], dict[str, str], dict[str, Any]]:
    """Return files with weights, index and what the index states, by the rules of transformers."""
    index, stated = _index(where, there, INDEX)
    if index and WHOLE in there and set(index.values()) != {WHOLE}:
        if all(file in there for file in index.values()):
            raise _invalid(
                f"{where} has {WHOLE} and an index that names other files ({sorted(set(index.values()))[0]}, …): which of "
                f"them is the model cannot be told; remove {WHOLE}, or {INDEX} with its shards"
            )
        index, stated = {}, {}  # What is left of an older save.
    if index:
        return _shards(where, there, index), index, stated
    if WHOLE in there:
        return (WHOLE,), {}, {}
    if evident := _evident(there):
        return evident, {}, {}
    index, stated = _index(where, there, PICKLED_INDEX)
    if index:
        return _shards(where, there, index), index, stated
    if PICKLED in there:
        return (PICKLED,), {}, {}
    raise NotFound(f"{where} holds no {WHOLE} and no {INDEX}: {_other_weights(there)}")


def _shards(where: str, there: Mapping[str, Path], index: Mapping[str, str]) -> tuple[str, ...]:
    named = sorted(set(index.values()))
    missing = [name for name in named if name not in there or not there[name].exists()]
    if missing:
        raise NotFound(
            f"{where} lacks {len(missing)} of {len(named)} shards, first {missing[0]}: the download is incomplete; fetch it "
            "again"
        )
    return tuple(named)


def _index(where: str, there: Mapping[str, Path], name: str) -> tuple[dict[str, str], dict[str, Any]]:
    if name not in there:
        return {}, {}
    parsed = read_json(there[name], where)
    weights, stated = parsed.get("weight_map"), parsed.get("metadata") or {}
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise _invalid(f"{name} in {where} names no file for any tensor: it is damaged; fetch it again")
    for file in sorted(set(weights.values())):
        if not plain_name(file):
            raise _invalid(
                f"{name} in {where} names {file[:80]!r}, which is not the name of a file beside it: an index names files of "
                "its own folder only; fetch it again"
            )
    return weights, stated if isinstance(stated, dict) else {}


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint. Raises `Invalid` for anything else."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"it has more than {_MAX_JSON} bytes")
        parsed = parse_json(path.read_bytes())
    except ValueError as error:
        raise _invalid(f"{path.name} in {where} is damaged: {error}; copy it again") from error
    if not isinstance(parsed, dict):
        raise _invalid(f"{path.name} in {where} is damaged: it holds no JSON object; copy it again")
    return parsed


def _evident(there: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the one safetensors file, or the one complete series of shards, that can only be the model."""
    candidates = sorted(name for name in there if name.endswith(".safetensors") and not _FOREIGN.match(name))
    if len(candidates) == 1 and not _SERIES.match(candidates[0]):
        return tuple(candidates) if candidates[0].count(".") == 1 else ()
    matches = [m for name in candidates if (m := _SERIES.match(name))]
    complete = matches and len(matches) == len(candidates) == int(matches[0]["count"])
    return tuple(candidates) if complete and len({(m["stem"], m["count"]) for m in matches}) == 1 else ()


def _other_weights(there: Mapping[str, Path]) -> str:
    names: Iterable[str] = sorted(there)
    if "adapter_config.json" in there:
        return "it holds an adapter, not a model; merge it into its base (peft: `merge_and_unload`) and save that"
    variant = next((n for n in names if re.fullmatch(r"model\.\w+\.safetensors(\.index\.json)?", n)), None)
    if variant:
        return f"it has the variant {variant}; load that with `variant=` and save it with `save_pretrained`"
    if found := [n for n in names if n.endswith(".safetensors")]:
        return (
            f"which of its {len(found)} .safetensors files are the model cannot be told ({found[0]}, …); fetch {INDEX}, or "
            "save the model with `save_pretrained`"
        )
    other = next((n for n in names if n.endswith((".gguf", ".pth", ".pt", ".bin", ".ckpt", ".msgpack", ".h5"))), None)
    found_there = f"its weights are in {other}, another format" if other else "it has no weights"
    return f"{found_there}; load the model with transformers and save it with `save_pretrained`"


def _invalid(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_BAD_SPEC)
