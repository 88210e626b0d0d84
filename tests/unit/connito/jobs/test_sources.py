from __future__ import annotations

import json
from pathlib import Path

import pytest
from connito.errors import Invalid, NotFound
from connito.jobs.sources import Reach, read_source, rows_of
from connito.jobs.spec import Source


def reach_of(root: Path, path: str, text: str = "") -> tuple[Reach, list[str], list[str]]:
    source = Source(path=path, text=text)
    reading = rows_of(source, root)
    reach = Reach(source.label, reading.account)
    documents = list(read_source(source, 0, reading, reach))
    return reach, [document.text for document in documents], [document.where for document in documents]


def read(root: Path, path: str, text: str = "") -> list[str]:
    return reach_of(root, path, text)[1]


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("second")
    (tmp_path / "in" / "a.md").write_text("first")
    (tmp_path / "in" / "deep" / "c.jsonl").write_text('{"text": "third"}\n"fourth"\n')
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")

    assert read(tmp_path, "in") == ["first", "second", "third", "fourth"]
    assert read(tmp_path, "in/**/*.jsonl") == ["third", "fourth"]
    assert read(tmp_path, "in/*.txt") == ["second"]
    assert read(tmp_path, str(tmp_path / "in" / "a.md")) == ["first"]


def test_a_template_makes_one_text_of_a_row(tmp_path: Path) -> None:
    row = {"q": "Why?", "a": {"long": "Because.", "score": 3}, "tags": ["x"], "none": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "rows.csv").write_text('q,a\n"Who, me?",You\n')

    assert read(tmp_path, "rows.jsonl", "{{Q}}: {q}\nA: {a.long} {a.score} {tags}{none}") == [
        "{Q}: Why?\nA: Because. 3 x"
    ]
    assert read(tmp_path, "rows.csv", "{q} {a}") == ["Who, me? You"]


def test_empty_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "  "}\n{"text": "x"}\n\n')

    reach, _, where = reach_of(tmp_path, "rows.jsonl")

    assert (reach.account.rows, reach.account.empty, where) == (2, 1, ["rows.jsonl:2"])


def test_lists_are_reached_by_index_and_rows_may_lack_a_field_that_others_have(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"content": "hello"}], "a": {"b": [1, 2, {"c": "deep"}]}, "tags": ["x", "y"]},
        {"messages": [], "a": None},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    assert read(tmp_path, "rows.jsonl", "{messages.0.content} {a.b[2].c}") == ["hello deep"]
    assert read(tmp_path, "rows.jsonl", "{tags}") == ["x\ny"]
    assert reach_of(tmp_path, "rows.jsonl", "{messages[0].content}")[0].account.dropped == {
        "rows without messages[0].content": 1
    }
    with pytest.raises(Invalid, match=r"rows.jsonl:1: the field 'messages' is an object.*\{messages.0\}"):
        read(tmp_path, "rows.jsonl", "{messages}")


@pytest.mark.parametrize(
    ("name", "content", "text", "said"),
    [
        ("r.jsonl", '{"title": "x", "n": 1}', "", "r.jsonl:1 has no `text`; its fields are n, title"),
        (
            "r.jsonl",
            '{"title": "x"}',
            "{titel}",
            "r.jsonl:1 has no field 'titel' that the template asks for; it has title",
        ),
        ("r.jsonl", '{"a": 1}', "{a.b}", "no field 'a.b'"),
        ("r.jsonl", '{"a": 1}', "all the same", "names no field in braces"),
        ("r.jsonl", "{", "", "r.jsonl:1 is not JSON"),
        ("r.jsonl", '"x"', "{a}", "r.jsonl:1 is text by itself"),
        ("r.txt", "text", "{a}", "is plain text and has no fields"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(Invalid) as caught:
        read(tmp_path, name, text)

    assert said in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or folder"):
        read(tmp_path, "missing.txt")
    with pytest.raises(NotFound, match="nothing matches"):
        read(tmp_path, "*.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="holds no text"):
        read(tmp_path, "empty")
