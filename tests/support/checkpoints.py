"""Checkpoints as other people's programs save them, and `from_pretrained` on the same folder as the judge of what was loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from connito.base.description import build_manifest
from connito.base.loading import load_full, load_resident, load_resident_local
from connito.base.tiny import tokenizer
from connito.moe.layout import require_moe_layers
from connito.moe.resident import compress
from safetensors.torch import load_file, save_file

from tests.support.families import logits, tiny_model
from tests.support.files import directory_reader

Tensors = dict[str, torch.Tensor]


def published(
    folder: Path, family: str = "qwen3_moe", *, dtype: torch.dtype | None = None, shard: str = "5GB", **changes: Any
) -> Path:
    """A random model of a family as transformers saves it, with a tokenizer of bytes."""
    model = tiny_model(family, buffers=True, **{"vocab_size": 300, **changes})
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, name: str = "config.json", without: str = "", **values: Any) -> None:
    """Change fields of a JSON file."""
    content = {**json.loads((folder / name).read_text()), **values}
    content.pop(without, None)
    (folder / name).write_text(json.dumps(content))


def change(folder: Path, how: Callable[[Tensors], Tensors], file: str = "model.safetensors") -> None:
    """Write the tensors of a file anew."""
    tensors = how(load_file(folder / file))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def theirs(folder: Path, **options: Any) -> Any:
    """The same folder as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options).eval()


def assert_same(made: Any, wanted: Any) -> None:
    """Every parameter and persistent buffer, bit for bit and in its type, and what the model makes of them."""
    ours, other = made.state_dict(), wanted.state_dict()
    assert ours.keys() == other.keys()
    for name, tensor in other.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(logits(made), logits(wanted))


def assert_as_transformers(folder: Path) -> None:
    """All three loaders give what transformers gives."""
    plain = theirs(folder)
    assert_same(load_full(folder), plain)
    top = max(require_moe_layers(plain))
    chosen = {top: [0, 2]}, {top: [1]}
    wanted = compress(plain, *chosen)
    assert_same(load_resident_local(folder, *chosen), wanted)
    manifest = build_manifest(folder)
    assert_same(load_resident(manifest, directory_reader(folder), *chosen), wanted)
