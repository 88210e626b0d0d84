"""`tiny` the folder of a small random MoE base with the byte tokenizer; `call` a verb in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Done(NamedTuple):
    """How a verb ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Done]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    from connito.cli import main

    def run(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["connito", *map(str, arguments)])
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return Done(int(code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from connito.base.checkpoint import save_checkpoint
    from connito.base.tiny import tokenizer
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=258, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=3,
        num_experts=8, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2,
        shared_expert_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[0], eos_token_id=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "model"
    return save_checkpoint(Qwen2MoeForCausalLM(config).eval(), folder, tokenizer())
