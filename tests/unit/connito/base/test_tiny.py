from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from connito.base.loading import load_full, load_tokenizer
from connito.base.tiny import DOMAINS, blocks, build_tiny, byte_symbols, tiny_texts
from connito.errors import NotFound


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(123)
    one = digests(build_tiny(tmp_path / "one", seed=1, steps=2))
    torch.manual_seed(456)
    two = digests(build_tiny(tmp_path / "two", seed=1, steps=2))
    other = digests(build_tiny(tmp_path / "other", seed=2, steps=2))
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= one.keys()


def test_building_leaves_the_random_state_and_threads_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_num_threads(before + 1)
    try:
        build_tiny(tmp_path, steps=2)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.rand(3), expected)


def test_it_is_an_ordinary_checkpoint_and_its_tokenizer_is_bytes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = build_tiny(tmp_path, steps=2)
    tokenizer = load_tokenizer({path.name: path for path in folder.iterdir()})
    text = "Σίγα, 12 \n\x00 ok"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    ids = blocks(tiny_texts("poems", 1, 8))[:2]
    theirs = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, load_full(folder)(input_ids=ids).logits)


def test_domains_have_texts_of_their_own() -> None:
    assert len(set(byte_symbols())) == 256
    seen = {domain: tiny_texts(domain, 1, 20) for domain in DOMAINS}
    assert seen == {domain: tiny_texts(domain, 1, 20) for domain in DOMAINS}
    for domain, texts in seen.items():
        assert not set(texts) & set(tiny_texts(domain, 2, 20))
        assert len(set(texts)) == 20
    with pytest.raises(NotFound, match="recipes, logs, poems, ledgers"):
        tiny_texts("opera", 1)
