from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from connito.base.recipes import Recipe, _texts
from connito.data.prepare import Split, part_of
from connito.data.reading.passages import passages
from connito.data.reading.remote import find_remote
from connito.data.reading.rows import Account, Wanted
from connito.data.reading.texts import name_of
from connito.errors import Invalid

WORDS = [f"w{i}" for i in range(2000)]


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("a/medical.txt", "medical"),
        ("medical.jsonl.gz", "medical"),
        ("v1.2/news.v2.csv.zst", "news.v2"),
        ("folder/", "folder"),
        ("s3://bucket/set", "set"),
        ("a.tar.gz", "a.tar"),
    ],
)
def test_text_is_named_after_its_file(location: str, name: str) -> None:
    assert name_of(location) == name


@pytest.mark.parametrize("location", ["s3://", "s3:///", "hf://", "hf://datasets/", "hf://datasets", "gs://"])
def test_an_address_without_a_name_is_no_matter_of_trying_again(location: str) -> None:
    with pytest.raises(Invalid, match=f"^{location} names nothing: write "):
        find_remote(location, Wanted(), Account())


def test_passages_are_the_same_from_pieces_of_any_size() -> None:
    text = (
        "\n\n".join(" ".join(WORDS[i : i + 100]) for i in range(0, 2000, 100)) + "\n\n\n\n" + "x" * 9_000 + "\n\nend\n"
    )
    whole = list(passages([text]))

    assert "\n\n".join(whole).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert all(len(passage) <= 4_000 for passage in whole)
    for size in (1, 7, 2_000, 4_001):
        assert list(passages(text[i : i + size] for i in range(0, len(text), size))) == whole


def test_the_routers_of_a_base_see_no_held_out_text(tmp_path: Path) -> None:
    rows = [f"text number {i}" for i in range(200)]
    (tmp_path / "one.csv.gz").write_bytes(gzip.compress(("text\n" + "\n".join(rows)).encode()))

    shown = list(_texts(Recipe("model", data=(str(tmp_path / "one.csv.gz"),)))["one"])
    assert shown == [text for text in rows if part_of(text, Split()) != "holdout"]
    assert 100 < len(shown) < 200
