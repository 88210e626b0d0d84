"""`tiny`  a directory with the tiny base; `full` a fresh full model of it; `sequences(domain, n, seed)` its text as blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.loading import load_full
from connito.base.tiny import blocks, build_tiny, tiny_texts

Sequences = Callable[..., Any]


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
    def make(domain: str, count: int, seed: int, length: int = 64) -> Any:
        table = blocks(tiny_texts(domain, seed, 4 + count), length + 1).numpy().astype(np.int32)
        assert len(table) >= count
        return table[:count]

    return make
