"""Fixtures of small models. A folder's conftest imports those that its tests use.

`one_thread`     torch computes in one thread
`tiny`           a directory with the tiny base; `full` a fresh full model of it
`sequences`      `sequences(domain, count, seed)`: its text as blocks, (count, length + 1) int32
`distinct_tiny`  a tiny base whose experts differ
`random_base`    a directory with a small mixture of random weights and the byte tokenizer
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.loading import load_full, load_tokenizer
from connito.base.tiny import DOMAINS, blocks, build_tiny, tiny_texts, tokenizer
from connito.moe.resident import compress
from connito.moe.rows import write_rows
from connito.moe.training import train_local
from numpy.typing import NDArray

Sequences = Callable[..., NDArray[np.int32]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def full(tiny: Path) -> Any:
    return load_full(tiny)


@pytest.fixture(scope="session")
def sequences() -> Sequences:
    def make(domain: str, count: int, seed: int, length: int = 64) -> NDArray[np.int32]:
        table = blocks(tiny_texts(domain, seed, 4 + count), length + 1).numpy().astype(np.int32)
        assert len(table) >= count
        return table[:count]

    return make


@pytest.fixture(scope="session")
def distinct_tiny(tmp_path_factory: pytest.TempPathFactory, sequences: Sequences) -> Path:
    """The tiny base as it is built has copies of one expert: leaving some out would change nothing. A few steps on every
    domain make each expert its tokens' own."""
    plain = build_tiny(tmp_path_factory.mktemp("plain"), seed=0)
    everything = {index: list(range(8)) for index in (2, 3)}
    text = np.concatenate([sequences(domain, 40, 500) for domain in DOMAINS])
    text = text[np.random.default_rng(0).permutation(len(text))].reshape(40, 4, -1)
    state, _ = train_local(compress(load_full(plain), everything), text, learning_rate=3e-3)
    model = load_full(plain)
    write_rows(model, everything, state)
    return save_checkpoint(model, tmp_path_factory.mktemp("tiny"), load_tokenizer(plain))


def save_random(folder: Path, **changes: Any) -> Path:
    """A Qwen2-MoE of random weights with the byte tokenizer."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    }  # fmt: skip
    return save_checkpoint(Qwen2MoeForCausalLM(Qwen2MoeConfig(**values | changes)).eval(), folder, tokenizer())


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("base") / "model", eos_token_id=256)
