"""Published data sets, cloned or saved by the library datasets, and the files that Arrow writes."""

from __future__ import annotations

import datetime
import decimal
import io
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from connito.errors import Invalid, NotFound

from tests.support.reading import account, rows, texts, tree

TABLE = pa.table({
    "text": ["one", None, "größer"], "n": [1, 2, None], "deep": [{"a": [1, 2], "b": "x"}, None, {"a": [], "b": None}],
    "turns": [[{"role": "user", "content": "hi"}], [], None],
})  # fmt: skip


def parquet(*lines: str) -> bytes:
    """A Parquet file of texts."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": list(lines)}), buffer)
    return buffer.getvalue()


def write(path: Path, table: pa.Table, kind: str) -> Path:
    """Write a table in one of Arrow's formats."""
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "feather":
        feather.write_feather(table, path)
    elif kind == "orc":
        orc.write_table(table, path)
    else:
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow", "stream", "orc"])
@pytest.mark.parametrize("suffix", ["", ".parquet", ".arrow", ".txt"])
def test_tables_of_arrow_under_any_name(tmp_path: Path, kind: str, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", TABLE, kind)

    assert rows(path) == TABLE.to_pylist()
    assert texts(path) == ["one", "größer"]
    assert texts(path, "{deep.a[1]}{turns.0.content}") == ["2hi"]


def test_values_that_are_no_text(tmp_path: Path) -> None:
    table = pa.table({
        "when": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns")), "day": [datetime.date(2026, 1, 2)],
        "price": [decimal.Decimal("1.20")], "picture": [b"\x89PNG\0\1\2"], "written": ["größer".encode()],
        "kind": pa.array(["x"]).dictionary_encode(), "old": pa.array([b"caf\xe9 text"], pa.binary()),
    })  # fmt: skip
    path = write(tmp_path / "a.parquet", table, "parquet")

    (row,) = rows(path)
    assert (row["picture"], row["written"], row["kind"]) == (None, "größer", "x")
    assert texts(path, "{when} {day} {price} {old}") == ["2023-11-14 22:13:20.000000001 2026-01-02 1.20 caf\ufffd text"]
    assert account(path).dropped["binary values"] == 1


def test_types_that_programs_choose(tmp_path: Path) -> None:
    table = pa.table({
        "text": pa.array(["a", None], pa.large_string()), "seen": pa.array(["x", "y"], pa.string_view()), "none": pa.nulls(2),
        "map": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string())),
        "many": pa.array([[1], None], pa.large_list(pa.int64())),
    })  # fmt: skip
    path = write(tmp_path / "a.arrow", table, "arrow")

    assert rows(path)[0] == {"text": "a", "seen": "x", "none": None, "map": {"k": "v"}, "many": [1]}
    assert texts(path, "{text}{map.k}{many.0}{none}") == ["av1"]


def test_a_text_column_with_broken_bytes(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\5\0\0\0\x08\0\0\0"), pa.py_buffer(b"caf\xe9!abc"))
    path = write(tmp_path / "a.parquet", pa.table({"text": broken}), "parquet")

    assert texts(path) == ["caf\ufffd!", "abc"]


CARD = """---
license: cc-by-4.0
configs:
- config_name: fr
  data_files:
  - split: test
    path: fr/test-*
  - split: train
    path: "fr/train-*.parquet"
- config_name: de
  data_files: de/*.parquet
---
# A data set
"""


def clone(tmp_path: Path, card: str = CARD) -> Path:
    """A data set as it is cloned."""
    return tree(
        tmp_path / "clone",
        {
            "README.md": card, ".gitattributes": "*.parquet filter=lfs", ".git/HEAD": "ref",
            "fr/train-00000-of-00002.parquet": parquet("a"),
            "fr/train-00001-of-00002.parquet": parquet("b"), "fr/test-00000-of-00001.parquet": parquet("held"),
            "de/all.parquet": parquet("c"), "loader.py": "raise SystemExit",
        },
    )  # fmt: skip


def test_a_clone_is_read_as_its_card_says(tmp_path: Path) -> None:
    folder = clone(tmp_path)

    with pytest.raises(Invalid, match=r"several configurations: say which, `config: NAME`, of fr, de"):
        rows(folder)
    with pytest.raises(Invalid, match=r"no configuration 'es'; it has fr, de"):
        rows(folder, config="es")
    assert texts_of(folder, config="fr") == ["a", "b"]
    assert texts_of(folder, config="fr", split="test") == ["held"]
    assert texts_of(folder, config="de") == ["c"]
    assert any("the split train was read (others: test)" in note for note in account(folder, config="fr").notes)


def texts_of(folder: Path, **wanted: str) -> list[str]:
    """Texts of a part of a data set."""
    return [row["text"] for row in rows(folder, **wanted)]


@pytest.mark.parametrize(
    "files",
    [
        'data_files: "fr/train-*"', "data_files: [fr/train-00000-of-00002.parquet, fr/train-00001-of-00002.parquet]",
        'data_files: {train: "**/train-*.parquet", test: "fr/test-*"}', "data_dir: fr\n  data_files: train-*",
        "data_files:\n  - split: train\n    path: ['fr/train-0000[01]-*', nothing/*]",
    ],
)  # fmt: skip
def test_the_ways_to_name_files_in_a_card(tmp_path: Path, files: str) -> None:
    folder = clone(tmp_path, f"---\nconfigs:\n- config_name: default\n  {files}\n---\n")

    assert texts_of(folder) == ["a", "b"]


def test_a_card_without_configurations_and_a_broken_one(tmp_path: Path) -> None:
    for card in ("# Only words\n", "---\nlicense: [\n---\n", "---\nconfigs: words\n---\n", "---\n- list\n---\n"):
        folder = clone(tmp_path, card)
        assert texts_of(folder) == ["c", "a", "b"]
        assert account(folder).skipped["of another split"] == 1


def test_a_data_set_of_a_script_is_not_run(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", {"README.md": "---\nconfigs: []\n---\n# Words", "d.py": "raise SystemExit"})

    with pytest.raises(NotFound, match="loading script, which is never run"):
        rows(folder)


def test_files_that_the_card_names_and_that_are_not_there(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", {"README.md": "---\nconfigs:\n- config_name: x\n  data_files: data/*.parquet\n---\n"})

    with pytest.raises(NotFound, match=r"lacks the files data/\*.parquet .*git lfs pull"):
        rows(folder)


def test_what_the_library_saved_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(
        [{"text": f"row {i}", "turns": [{"role": "user", "content": str(i)}]} for i in range(50)]
    )
    table.save_to_disk(tmp_path / "one", num_shards=3)
    both = datasets.DatasetDict({"test": table.select([1]), "train": table.select(range(5, 9))})
    both.save_to_disk(tmp_path / "both")

    assert rows(tmp_path / "one") == list(table)
    assert rows(tmp_path / "both") == list(both["train"])
    assert rows(tmp_path / "both", split="test") == list(both["test"])
    with pytest.raises(Invalid, match="no split 'dev'; it has test, train"):
        rows(tmp_path / "both", split="dev")
    next((tmp_path / "one").glob("*00001*.arrow")).unlink()
    with pytest.raises(NotFound, match=r"lacks data-00001-of-00003.arrow"):
        rows(tmp_path / "one")


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_the_same_rows_as_the_library_datasets(tmp_path: Path, kind: str) -> None:
    table: Any = [{"text": f'größer, "row" {i}\nline', "label": i % 3, "score": i / 4} for i in range(200)]
    frame = pandas.DataFrame(table)
    path = tmp_path / f"a.{kind}"
    {"csv": lambda: frame.to_csv(path, index=False), "json": lambda: frame.to_json(path, orient="records", lines=True),
     "parquet": lambda: frame.to_parquet(path)}[kind]()  # fmt: skip

    expected = list(datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")))
    found = rows(path)
    if kind == "csv":  # Cells are text; what they mean is for whoever reads them.
        expected = [{name: str(value) for name, value in row.items()} for row in expected]
    assert found == expected


def test_splits_of_other_names_are_asked_for(tmp_path: Path) -> None:
    files = "data_files:\n  - {split: train_sft, path: fr/train-*}\n  - {split: test_sft, path: fr/test-*}"
    folder = clone(tmp_path, f"---\nconfigs:\n- config_name: default\n  {files}\n---\n")

    with pytest.raises(Invalid, match=r"splits train_sft, test_sft and no train: say which, .*`split: train_sft`"):
        rows(folder)
    assert texts_of(folder, split="train_sft") == ["a", "b"]
