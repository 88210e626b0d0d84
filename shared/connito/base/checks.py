"""Is this folder a base that a run can start from? Answered from its headers and configuration, in seconds.

What is wrong with a checkpoint should be said before hours of hashing, uploading or computing, and in words that name
the cause and the remedy. No weight is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from connito.base.description import Description, describe_files, not_ranged
from connito.data.checkpoint_files import TOKENIZER_FILES, CheckpointFiles, find_checkpoint
from connito.errors import Invalid
from connito.v1 import reasons_pb2

# Types that every part of a run computes with. Experts in others would have to be converted on every load.
DTYPES = ("F32", "BF16", "F16")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
    "tekken.json",
)


@dataclass(frozen=True)
class Layout:
    """Sizes of a sound base, as it is loaded. `experts`: (number, top-k) by layer; `expert_bytes`: of one, by layer; `bytes`:
    of all tensors."""

    family: str
    experts: dict[int, tuple[int, int]]
    expert_bytes: dict[int, int]
    bytes: int
    value_bytes: int
    vocabulary: int


def check_base(folder: Path) -> Layout:
    """Read headers, configuration and tokenizer. Imports torch, loads no weights.

    Raises `NotFound` or `Invalid`, with cause and remedy, for a folder that is no checkpoint, a missing or cut shard, a
    type that is not supported, a dense or unknown family, names of another architecture, a tokenizer of another model.
    """
    files = find_checkpoint(folder)
    if files.pickled:
        raise not_ranged(files)
    description = describe_files(files)
    layout = _layout(files, description)
    _check_tokenizer(files, layout.vocabulary)
    return layout


def _layout(files: CheckpointFiles, description: Description) -> Layout:
    from connito.base.stored import format_name

    layers = description.layers
    for layer in layers.values():
        held = getattr(layer.experts, layer.parameters[0])
        if format_name(held.dtype) not in DTYPES:
            raise _invalid(
                f"the experts of {files.where} are of type {format_name(held.dtype)}: they are trained as "
                f"{', '.join(DTYPES)}; save the model in one of these",
                reasons_pb2.REASON_WRONG_DTYPE,
            )
    if odd := next((layer for layer in layers.values() if not description.rowwise(layer)), None):
        raise _invalid(
            f"{files.where} stores the experts of {odd.experts_name} in a way that single ones cannot be read from: write it "
            f"once with fused experts, `connito base import {files.where} --rewrite OUT`",
            reasons_pb2.REASON_WRONG_TENSORS,
        )
    banks = {i: [getattr(layer.experts, part) for part in layer.parameters] for i, layer in layers.items()}
    return Layout(
        str(description.config.model_type),
        {index: (layer.num_experts, layer.top_k) for index, layer in layers.items()},
        {index: sum(bank[0].nbytes for bank in each) for index, each in banks.items()},
        sum(tensor.nbytes for tensor in description.skeleton.state_dict().values()),
        min(bank.itemsize for each in banks.values() for bank in each),
        description.vocabulary,
    )


def _check_tokenizer(files: CheckpointFiles, vocabulary: int) -> None:
    from connito.base.loading import load_tokenizer

    there = [name for name in TOKENIZER_FILES if name in files.paths]
    try:
        # Without any of these the library makes up an empty tokenizer.
        if not set(there) & set(_TOKENIZERS):
            raise ValueError(f"none of {', '.join(_TOKENIZERS)} is there")
        tokenizer = load_tokenizer(files.side())
    except Exception as error:
        raise _invalid(
            f"{files.where} has no tokenizer that can be loaded: {_why(error)}; put tokenizer.json and "
            "tokenizer_config.json of this model beside its weights"
        ) from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise _invalid(
            f"the tokenizer in {files.where} gives ids up to {largest}, but the model knows {vocabulary} tokens: it belongs "
            "to another model; copy the tokenizer that came with these weights"
        )
    if not tokenizer.encode("a text", add_special_tokens=False):
        raise _invalid(
            f"the tokenizer in {files.where} knows no words, and makes nothing of a text: copy its files again from where the "
            "weights are from"
        )
    if tokenizer.eos_token_id is None:
        raise _invalid(
            f"the tokenizer in {files.where} has no end-of-text token, which separates documents: set `eos_token` in "
            "tokenizer_config.json"
        )


def _why(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "it is code of its own, which is never run here" if "custom code" in text or "execute" in text else text


def _invalid(message: str, reason: reasons_pb2.Reason.ValueType = reasons_pb2.REASON_BAD_SPEC) -> Invalid:
    return Invalid(message, reason=reason)
