"""Tokenizers and chat templates in the styles that models are published with, written for the tests.

Each template is there with and without `{% generation %}` marks: with them transformers itself says what the assistant
says, and that is what must be found without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MARK, UNMARK = "{% generation %}", "{% endgeneration %}"

# Turns as <|im_start|>role … <|im_end|>, one a line.
CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}[[{{ m.content }}<|im_end|>]]{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A header of its own for each turn, contents trimmed, a token at each end, the beginning of text in front.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}[[{{ m.content | trim }}<|eot_id|>]]{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Instructions in brackets, no turn for the assistant; the system's word goes into the last instruction; turns must alternate.
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set word = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set word = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns of user and assistant must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (word if loop.index0 >= rest | length - 2 else '') + m.content + ' [/INST]' }}"
    "{% else %}[[{{ ' ' + m.content | trim + eos_token }}]]{% endif %}{% endfor %}"
)
# The assistant is called model; nobody may speak for a system.
MODEL_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('there is no system here') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}[[{{ m.content | trim }}<end_of_turn>]]{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Tokens for who speaks that are not marked as special, and thoughts of earlier answers left out.
THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' }}[["
    "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}{{ eos_token }}]]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# The next speaker's token is what ends a turn.
BARE_TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}[[{{ m.content }}{% if not loop.last %}<|user|>{% endif %}]]{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}"
)
STYLES = {
    "chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS, "model-turns": MODEL_TURNS, "thinking": THINKING,
}  # fmt: skip
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>",
)  # fmt: skip
# In the vocabulary, but not marked as special.
ADDED = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


def plain(style: str) -> str:
    """The template without marks of what the assistant says."""
    return style.replace("[[", "").replace("]]", "")


def marked(style: str) -> str:
    """The template with marks of what the assistant says."""
    return style.replace("[[", MARK).replace("]]", UNMARK)


def byte_tokenizer() -> Any:
    """The tokenizer of the tiny base, which reads bytes, with the tokens of every style."""
    from connito.base.tiny import tokenizer

    made = tokenizer()
    return _with_tokens(made)


def piece_tokenizer() -> Any:
    """A unigram tokenizer that marks words by a sign in front of them, and puts a beginning before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    words = [
        "the ledger of the house was closed in may",
        "who keeps a ledger keeps a house",
        "<>|[]/_:.,;?!é",
        "abc xyz",
    ]
    alphabet = [chr(code) for code in range(32, 127)] + list("\néß｜▁")
    core.train_from_iterator(
        words * 5,
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", initial_alphabet=alphabet,
            show_progress=False,
        ),
    )  # fmt: skip
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _with_tokens(
        PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )


def slow_tokenizer() -> Any:
    """A tokenizer written in Python, which does not say where its tokens lie."""
    from transformers import ByT5Tokenizer

    return _with_tokens(ByT5Tokenizer())


TOKENIZERS: dict[str, Callable[[], Any]] = {"bytes": byte_tokenizer, "pieces": piece_tokenizer, "slow": slow_tokenizer}


def _with_tokens(tokenizer: Any) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tokenizer
