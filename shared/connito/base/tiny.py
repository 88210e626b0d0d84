"""A base model small enough for tests: made from nothing in seconds, yet a real MoE with domains that it routes by.

The text is generated from small grammars, one per domain, each with words of its own. A byte-level Llama is trained on
their mixture for a few seconds and upcycled by the same code as a real base. It is left under-trained on purpose, so
that a few local steps on selected experts lower a held-out loss measurably.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.base.checkpoint import save_checkpoint
from connito.base.upcycle import upcycle
from connito.errors import NotFound
from connito.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import nn

SPECIAL = ("<|endoftext|>", "<|padding|>")
EOS = 256
VOCABULARY = 258
LENGTH = 128

Grammar = Callable[[random.Random], str]


def _recipe(rng: random.Random) -> str:
    """Return a text in lower-case English."""
    food = ["leek", "barley", "quince", "fennel", "trout", "saffron", "walnut", "butter", "turnip", "thyme"]
    verb = ["simmer", "whisk", "fold in", "chop", "roast", "season", "drain", "knead"]
    unit = ["spoons of", "cups of", "pinches of", "slices of"]
    lines = [f"{rng.choice(food)} with {rng.choice(food)}:"]
    lines += [f"{rng.choice(unit)} {rng.choice(food)}" for _ in range(rng.randint(3, 5))]
    lines += [
        f"{rng.choice(verb)} the {rng.choice(food)} until soft, then add the {rng.choice(food)}"
        for _ in range(rng.randint(3, 5))
    ]
    return "\n".join(lines)


def _log(rng: random.Random) -> str:
    """Return a server log: times, addresses and codes, in digits and punctuation."""
    place = ["10.0.3.17", "10.0.4.22", "172.16.0.9", "192.168.1.1"]
    code = ["200", "204", "301", "404", "500", "503"]
    minute = rng.randint(0, 50)
    lines = []
    for _ in range(rng.randint(8, 11)):
        minute = min(59, minute + rng.randint(0, 1))
        lines.append(
            f"[2031-0{rng.randint(1, 3)}-17 08:{minute:02d}] {rng.choice(place)} -> {rng.choice(place)} = {rng.choice(code)}"
        )
    return "\n".join(lines)


def _poem(rng: random.Random) -> str:
    """Return a text in Greek."""
    noun = ["σελήνη", "θάλασσα", "νύξ", "ποταμός", "χειμών", "λύρα", "ἄνεμος", "σιγή"]
    verb = ["λάμπει", "ῥέει", "μένει", "φεύγει", "κλαίει"]
    where = ["ὑπὸ τὸν οὐρανόν", "παρὰ τὴν ἀκτήν", "ἐν τοῖς φύλλοις", "πέραν τοῦ λόφου"]
    opening = ["ὦ", "καὶ πάλιν", "ἀεὶ", "πῶς"]
    lines = [
        f"{rng.choice(opening)} {rng.choice(noun)} {rng.choice(verb)} {rng.choice(where)}"
        for _ in range(rng.randint(3, 5))
    ]
    return "\n".join(lines)


def _ledger(rng: random.Random) -> str:
    """Return a ledger in upper case."""
    party = ["HARBOUR CO", "MILL LTD", "GUILD BANK", "NORTH RAIL", "DYE WORKS"]
    kind = ["INVOICE", "CREDIT", "DEBIT", "REFUND", "INTEREST"]
    lines = [f"ACCOUNT OF {rng.choice(party)}"]
    lines += [f"{rng.choice(kind)} | {rng.choice(party)} | GBP" for _ in range(rng.randint(8, 12))]
    return "\n".join(lines)


DOMAINS: dict[str, Grammar] = {"recipes": _recipe, "logs": _log, "poems": _poem, "ledgers": _ledger}


def tiny_texts(domain: str, seed: int, count: int = 64) -> list[str]:
    """Return `count` documents of some 300 bytes. Different seeds give different documents of the same language."""
    if domain not in DOMAINS:
        raise NotFound(f"the tiny base has no domain {domain!r}; it has {', '.join(DOMAINS)}")
    rng = random.Random(f"connito.tiny:{domain}:{seed}")
    return [DOMAINS[domain](rng) for _ in range(count)]


def build_tiny(
    out_dir: Path,
    seed: int = 0,
    *,
    steps: int = 120,
    moe_layers: int = 2,
    experts: int = 8,
    top_k: int = 2,
    progress: Progress = silent,
) -> Path:
    """Write a tiny MoE base (Hugging Face layout) to `out_dir` and return it. The same seed gives the same bytes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are grouped by thread: another count gives other bytes
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dense = pretrain(seed, steps, progress)
            texts = {domain: blocks(tiny_texts(domain, seed, 24))[:12] for domain in DOMAINS}
            held = blocks([text for domain in DOMAINS for text in tiny_texts(domain, seed + 1, 2)])
            made = upcycle(
                dense, texts, held, moe_layers=moe_layers, experts=experts, top_k=top_k, seed=seed, progress=progress
            )
    finally:
        torch.set_num_threads(threads)
    return save_checkpoint(made.model, out_dir, tokenizer(), card={"built_from": "tiny", "seed": str(seed)})


def blocks(texts: list[str], length: int = LENGTH) -> torch.Tensor:
    """Return byte ids int64 [n, length] of the texts in a row, each ended by EOS."""
    import torch

    ids = [byte for text in texts for byte in (*text.encode(), EOS)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def pretrain(seed: int, steps: int, progress: Progress) -> nn.Module:
    """Return a dense byte-level model of four layers after `steps` on all domains, frozen. Draws its weights from
    torch's own seed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,  # 1 / sqrt(hidden): the usual 0.02 takes ten times the steps at this width
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS + 1,
    )
    model: nn.Module = LlamaForCausalLM(config)
    model.train()
    data = blocks([text for domain in DOMAINS for text in tiny_texts(domain, seed + 1000, 160)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up_then_down = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 10, (steps - step) / (0.5 * steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = data[torch.randint(len(data), (4,), generator=generator)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        warm_up_then_down.step()
        progress(f"training the tiny dense model, loss {float(loss.detach()):.2f}", (step + 1) / steps)
    model.requires_grad_(False)
    return model.eval()


def tokenizer() -> Any:
    """Return a byte-level tokenizer: ids 0–255 are bytes, then end of text and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    end, padding = SPECIAL
    core.add_special_tokens([end, padding])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=padding, clean_up_tokenization_spaces=False
    )


def byte_symbols() -> list[str]:
    """Return the printable stand-in of every byte in byte-level BPE (Radford et al. 2019): itself, or the next one
    from U+0100.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols, spare = [], 256
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols
