"""`tiny` a directory with a tiny base whose experts differ; `full` a fresh full model of it; `sequences(…)` its text.

The tiny base as it is built has copies of one expert: leaving some out would change nothing. A few steps on every domain
make each expert its tokens' own.
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
from connito.base.tiny import DOMAINS, blocks, build_tiny, tiny_texts
from connito.moe.resident import compress
from connito.moe.rows import write_rows
from connito.moe.training import train_local


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, sequences: Callable[..., Any]) -> Path:
    plain = build_tiny(tmp_path_factory.mktemp("plain"), seed=0)
    everything = {index: list(range(8)) for index in (2, 3)}
    text = np.concatenate([sequences(domain, 40, 500) for domain in DOMAINS])
    text = text[np.random.default_rng(0).permutation(len(text))].reshape(40, 4, -1)
    state, _ = train_local(compress(load_full(plain), everything), text, learning_rate=3e-3)
    model = load_full(plain)
    write_rows(model, everything, state)
    return save_checkpoint(model, tmp_path_factory.mktemp("tiny"), load_tokenizer(plain))


@pytest.fixture
def full(tiny: Path) -> Any:
    return load_full(tiny)


@pytest.fixture(scope="session")
def sequences() -> Callable[..., Any]:
    def make(domain: str, count: int, seed: int, length: int = 64) -> Any:
        table = blocks(tiny_texts(domain, seed, 4 + count), length + 1).numpy().astype(np.int32)
        assert len(table) >= count
        return table[:count]

    return make


@pytest.fixture
def logits(sequences: Callable[..., Any]) -> Callable[..., Any]:
    ids = torch.from_numpy(sequences("recipes", 2, 60)[:, :-1].astype("int64"))

    def of(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    return of
