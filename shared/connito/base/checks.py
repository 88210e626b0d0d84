"""Is this folder a base that a run can start from? Answered from its headers and configuration, in seconds.

What is wrong with a checkpoint should be said before hours of hashing, uploading or computing, and in words that name
the cause and the remedy. No weight is read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connito.data.manifest import headers_of, is_expert_tensor
from connito.errors import Invalid, NotFound
from connito.v1 import reasons_pb2

# Types that every part of a run computes with. Experts in others would have to be converted on every load.
DTYPES = ("F32", "BF16", "F16")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """Sizes of a sound base, from its headers. `experts`: (number, top-k) by layer; `bytes`: of all tensors."""

    family: str
    experts: dict[int, tuple[int, int]]
    bytes: int
    value_bytes: int
    vocabulary: int
    shared_experts: tuple[str, ...]


def check_base(folder: Path) -> Layout:
    """Read headers, configuration and tokenizer. Imports torch, loads no weights.

    Raises `NotFound` or `Invalid`, with cause and remedy, for a folder that is no checkpoint, a missing or cut shard, a
    type that is not supported, a dense or unknown family, names of another architecture, a tokenizer of another model.
    """
    config = check_files(folder)
    tensors = headers_of(folder)
    _check_dtypes(folder, tensors.items())
    layout = _check_architecture(folder, config, tensors)
    _check_tokenizer(folder, layout.vocabulary)
    return layout


def check_files(folder: Path) -> dict[str, Any]:
    """Return the content of config.json once every file of the checkpoint is found to be complete."""
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder; give the folder of a base model, as `connito base build` makes it")
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder} has no config.json: it is not a checkpoint in the Hugging Face layout")
    try:
        config = json.loads((folder / "config.json").read_text())
        index = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid(f"config.json or {INDEX} in {folder} is damaged: {error!r}; copy it again") from error
    missing = sorted({name for name in index.values() if not (folder / name).is_file()})
    if missing:
        raise NotFound(
            f"{folder} lacks {len(missing)} of {len(set(index.values()))} shards, first {missing[0]}: the download is "
            "incomplete; fetch it again"
        )
    if not any(folder.glob("*.safetensors")):
        others = [path.name for pattern in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(pattern)]
        found = f"its weights are in {others[0]}, another format" if others else "it has no weights"
        raise NotFound(f"{folder} holds no .safetensors file: {found}; save the model with `safe_serialization=True`")
    if config.get("quantization_config"):
        raise _invalid(
            f"{folder} is quantised ({config['quantization_config'].get('quant_method', 'unknown method')}): experts are "
            "trained as F32 or BF16 rows; use the checkpoint that was not quantised",
            reasons_pb2.REASON_WRONG_DTYPE,
        )
    return dict(config)


def _check_dtypes(folder: Path, tensors: Iterable[tuple[str, Any]]) -> None:
    for name, entry in tensors:
        if is_expert_tensor(name) and entry.dtype not in DTYPES:
            raise _invalid(
                f"{name} in {folder} is of type {entry.dtype}: experts are trained as {', '.join(DTYPES)}; convert the "
                "checkpoint, or use the one that was not quantised",
                reasons_pb2.REASON_WRONG_DTYPE,
            )


def _check_architecture(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Layout:
    """Return the family's own modules, without memory, beside the checkpoint's names."""
    from connito.base.loading import build_meta, config_from_json
    from connito.moe.layout import require_moe_layers, shared_experts

    parsed = config_from_json(json.dumps(config).encode())
    try:
        model = build_meta(parsed)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise _invalid(
            f"no causal language model can be made from {folder}/config.json ({parsed.model_type}): {error}; give the "
            "folder of a text model"
        ) from error
    layers = require_moe_layers(model)
    expected = sum(tensor.numel() for name, tensor in model.state_dict().items() if is_expert_tensor(name))
    stored = sum(entry.values for name, entry in tensors.items() if is_expert_tensor(name))
    if not stored:
        raise _invalid(
            f"{folder} stores its experts under names that cannot be mapped to byte ranges ({parsed.model_type}): write it "
            f"once with fused experts, `connito base import {folder} --rewrite OUT`",
            reasons_pb2.REASON_WRONG_TENSORS,
        )
    if stored < expected:
        raise _invalid(
            f"{folder} holds {stored} values of routed experts, but its config.json describes {expected}: tensors are "
            "missing, or the configuration belongs to another checkpoint; copy both again",
            reasons_pb2.REASON_WRONG_TENSORS,
        )
    widths = {"F32": 4, "BF16": 2, "F16": 2}
    value = min((widths[entry.dtype] for name, entry in tensors.items() if is_expert_tensor(name)), default=4)
    return Layout(
        str(parsed.model_type),
        {index: (layer.num_experts, layer.top_k) for index, layer in layers.items()},
        sum(entry.length for entry in tensors.values()),
        value,
        int(model.get_input_embeddings().weight.shape[0]),  # type: ignore[operator]
        tuple(shared_experts(model)),
    )


def _check_tokenizer(folder: Path, vocabulary: int) -> None:
    from connito.base.loading import load_tokenizer

    try:
        # Without any of these the library makes up an empty tokenizer.
        if not any((folder / name).is_file() for name in TOKENIZERS):
            raise ValueError(f"none of {', '.join(TOKENIZERS)} is there")
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _invalid(
            f"{folder} has no tokenizer that can be loaded: {str(error).splitlines()[0]}; put tokenizer.json and "
            "tokenizer_config.json of this model beside its weights"
        ) from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise _invalid(
            f"the tokenizer in {folder} gives ids up to {largest}, but the model knows {vocabulary} tokens: it belongs to "
            "another model; copy the tokenizer that came with these weights"
        )
    if tokenizer.eos_token_id is None:
        raise _invalid(
            f"the tokenizer in {folder} has no end-of-text token, which separates documents: set `eos_token` in "
            "tokenizer_config.json"
        )


def _invalid(message: str, reason: reasons_pb2.Reason.ValueType = reasons_pb2.REASON_BAD_SPEC) -> Invalid:
    return Invalid(message, reason=reason)
