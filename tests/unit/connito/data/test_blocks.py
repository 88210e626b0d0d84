from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from connito.base.tiny import EOS, tokenizer
from connito.data import blocks as module
from connito.data.blocks import blocks, check_enough, head
from connito.errors import Invalid, NotFound


def test_texts_are_read_in_pieces_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.txt"
    rows = [f"row {n} of the table" for n in range(40)]
    one.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    two.write_text("the end, Ω")
    shares: list[float] = []
    parts = list(blocks(tokenizer(), [one, two], 16, shares.append))
    assert len(parts) > 3
    assert all(part.shape[1] == 16 for part in parts[:-1])
    joined = np.concatenate([part.reshape(-1) for part in parts]).tolist()
    assert joined == [token for text in [*rows, "the end, Ω"] for token in (*text.encode(), EOS)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_head_is_so_many_tokens_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x" * 100)
    assert head(tokenizer(), [path], 64, 32).shape == (2, 32)
    assert head(tokenizer(), [path], 1000, 512).shape == (1, 101)


def test_too_little_text_and_foreign_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x" * 20)
    check_enough(tokenizer(), [path], 21, 258)
    with pytest.raises(Invalid, match=r"has 21 tokens.*at least 100"):
        check_enough(tokenizer(), [path], 100, 258)
    with pytest.raises(Invalid, match="id 256, but the model knows 200"):
        check_enough(tokenizer(), [path], 10, 200)
    path.write_text("")
    with pytest.raises(Invalid, match="holds no text"):
        check_enough(tokenizer(), [path], 100, 258)
    with pytest.raises(NotFound):
        check_enough(tokenizer(), [tmp_path / "none"], 1, 258)
