"""JSON in the shapes that tools and people give it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from connito.errors import Invalid

from tests.support.reading import account, rows, texts

ROWS = [{"text": f"row {i}", "n": i, "deep": {"a": [i, {"b": "größer"}]}} for i in range(12)]
SHAPES = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "blank lines between": "\n\n\n".join(map(json.dumps, ROWS)) + "\n\n",
    "dos lines": "\r\n".join(map(json.dumps, ROWS)),
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=4),
    "one after the other": "".join(map(json.dumps, ROWS)),
    "pretty, one after the other": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "commas behind lines": ",\n".join(map(json.dumps, ROWS)),
    "several arrays": json.dumps(ROWS[:5]) + "\n" + json.dumps(ROWS[5:]),
    "in data": json.dumps({"version": "1.1", "data": ROWS}),
    "in another field": json.dumps({"meta": {"a": 1}, "rows": ROWS, "count": 12}, indent=1),
    "in train beside test": json.dumps({"test": [{"text": "no"}], "train": ROWS}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
def test_the_same_rows_from_every_shape(tmp_path: Path, shape: str, name: str) -> None:
    (tmp_path / name).write_text(SHAPES[shape])

    assert rows(tmp_path / name) == ROWS


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_rows_when_they_do_not_fit_into_one_piece(tmp_path: Path, shape: str) -> None:
    long = [{**row, "text": f"{row['text']} {'x' * 200_000}"} for row in ROWS]
    text = SHAPES[shape]
    for row, longer in zip(ROWS, long, strict=True):
        text = text.replace(f'"{row["text"]}"', f'"{longer["text"]}"')
    (tmp_path / "a.json").write_text(text)

    assert rows(tmp_path / "a.json") == long


@pytest.mark.parametrize("orient", ["records", "columns", "split", "index"])
def test_tables_of_pandas(tmp_path: Path, orient: Any) -> None:
    table = pandas.DataFrame({"text": ["one", "two", "three"], "n": [1, 2, 3]})
    table.to_json(tmp_path / "a.json", orient=orient)

    assert rows(tmp_path / "a.json") == table.to_dict("records")


def test_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": ["one", "two"], "n": [1, 2]}))

    assert rows(tmp_path / "a.json") == [{"text": "one", "n": 1}, {"text": "two", "n": 2}]


def test_conversations_are_one_row_each(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    shares = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    for name, content in {
        "field": json.dumps({"messages": turns}), "list": json.dumps(turns), "nested": json.dumps([turns, turns]),
        "lines": json.dumps(turns) + "\n" + json.dumps(turns), "shares": json.dumps([{"conversations": shares}]),
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(content)

    assert rows(tmp_path / "field.json") == rows(tmp_path / "list.json") == [{"messages": turns}]
    assert rows(tmp_path / "nested.json") == rows(tmp_path / "lines.json") == [{"messages": turns}] * 2
    assert rows(tmp_path / "shares.json") == [{"conversations": shares}]
    assert texts(tmp_path / "shares.json") == ["Why?\n\nBecause."]


def test_what_is_no_number_or_no_character_is_nothing_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a\\ud800b", "x": NaN}\n{"text": null, "x": Infinity}\n{"text": NaN}\n{"text": "pair \\ud83d\\ude00"}\n'
        '{"text": "twice", "text": "last"}\n{"text": "\ttab\tinside"}\n{"text": 5}\n{"text": ["x", "y"]}\n[1, 2]\n7\n'
    )

    assert texts(tmp_path / "a.jsonl") == ["a\ufffdb", "pair 😀", "last", "tab\tinside", "5", "x\ny"]
    found = account(tmp_path / "a.jsonl")
    assert found.rows == 8
    assert found.dropped == {"broken characters replaced": 1, "rows without fields": 3}


def test_files_that_were_joined(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n\x1e{"text": "c"}\n')

    assert texts(tmp_path / "a.jsonl") == ["a", "b", "c"]


def test_nesting_near_the_limit_is_rows_or_a_sentence(tmp_path: Path) -> None:
    for depth in (50, 300, 600, 900, 950, 990, 5000):
        deep = '{"messages": [' * (depth // 2) + '"\\ud800"' + "]}" * (depth // 2)
        (tmp_path / "a.jsonl").write_text('{"text": "x", "deep": ' + deep + "}\n" + deep + "\n")
        with contextlib.suppress(Invalid):
            assert texts(tmp_path / "a.jsonl")[0] == "x"


def test_rows_of_python_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{'text': 'x', 'n': None}\n{'text': 'y', 'n': 1}\n")

    with pytest.raises(Invalid, match=r"Python.s own notation: write them with json.dumps"):
        texts(tmp_path / "a.txt")


def test_special_letters_of_the_format_in_text_stay_text(tmp_path: Path) -> None:
    odd = ['{"a": 1}', "[1, 2]", "\\", '"', "\u2028line", "a\x0bb\x1cc", "<|endoftext|>", "\ufeff"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"x{text}x"}, ensure_ascii=False) for text in odd))

    assert texts(tmp_path / "a.jsonl") == [f"x{text}x" for text in odd]


def test_prose_that_begins_like_json_is_prose(tmp_path: Path) -> None:
    for number, text in enumerate(
        [
            "[1] Smith, J. A book.\n[2] Jones.",
            "{braces} of a template",
            "[Chapter one] It began.",
            "[1, 2] is an interval",
        ]
    ):
        (tmp_path / f"{number}.txt").write_text(text)
        assert texts(tmp_path / f"{number}.txt") == [text]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": "b"\n{"text": "c"}', "a.jsonl:3 is not JSON"),
        ('{"text": "a"}\n{"text": "b', "a.jsonl:2 is not JSON.*was it cut off"),
        ('[{"text": "a"},\n{"text": "b"}', "does not end"),
        ('{"text": "a"}\nplain words', "a.jsonl:2 is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": [{"x": 1}], "b": [{"y": 2}]}', "several lists of rows .a, b."),
        ('{"title": "a", "n": 1}', "a.jsonl:1 has no `text`; its fields are n, title"),
        ('{"text": {"de": "ja"}}', "'text' is an object.*{text.de}"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)

    with pytest.raises(Invalid, match=said):
        texts(tmp_path / "a.jsonl")


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        (tmp_path / name).write_text("")
        assert rows(tmp_path / name) == []


def test_a_line_that_is_cut_off_is_named_beside_the_one_where_that_shows(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {number}"}) for number in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:5], lines[5][:7], *lines[6:]]))
    with pytest.raises(Invalid, match=r"a\.jsonl:7 is not JSON: .* in the value that line 6 begins"):
        rows(tmp_path / "a.jsonl")
