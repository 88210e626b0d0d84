"""A tokenizer as a GGUF file describes it: byte-level BPE, with the name by which llama.cpp knows how text is split first."""

from __future__ import annotations

import json
from typing import Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
# The first split of a tokenizer.json, by the name that llama.cpp has for it.
_SPLITS = {_GPT2: "gpt-2", _WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}


def add_tokens(writer: Any, tokenizer: Any, size: int) -> None:
    """Write vocabulary, merges, special tokens and chat template. `size`: rows of the embedding, which may have some to spare.

    Raises `Invalid` for a tokenizer that is not byte-level BPE, or that splits text in a way llama.cpp has no name for.
    """
    from gguf import TokenType

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refused(f"is {model['type']} without byte-level pieces")
    vocabulary = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(vocabulary, TokenType.NORMAL)
    for added in core.get("added_tokens", []):
        vocabulary[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    count = max(size, max(vocabulary) + 1)
    writer.add_tokenizer_model("gpt2")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    # Without merges it does not matter how text is split first, and llama.cpp wants one: this pair never lies side by side.
    writer.add_tokenizer_pre(_pre(core.get("pre_tokenizer")) if merges else "gpt-2")
    writer.add_token_list([vocabulary.get(index, f"[PAD{index}]") for index in range(count)])
    writer.add_token_types([kinds.get(index, TokenType.UNUSED) for index in range(count)])
    writer.add_token_merges(merges or ["\u0100\u0100 \u0100\u0100"])
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    empty = tokenizer("", add_special_tokens=True)["input_ids"]
    writer.add_add_bos_token(bool(empty) and empty[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre(given: dict[str, Any] | None) -> str:
    steps = (given or {}).get("pretokenizers", [given] if given else [])
    kinds = [step["type"] for step in steps]
    regex = next((step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"), "")
    if regex in _SPLITS:
        return _SPLITS[regex]
    if regex.startswith(_GPT4O):
        return "gpt-4o"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    raise _refused(f"splits text first by {regex[:60] or kinds}, for which it has no name")


def _refused(why: str) -> Invalid:
    return Invalid(
        f"this tokenizer cannot be written for llama.cpp: it {why}; export with --format hf-hub and convert with its own script",
        reason=reasons_pb2.REASON_BAD_SPEC,
    )
