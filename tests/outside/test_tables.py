"""Tables as spreadsheets, databases and programs write them, against what pandas and the csv module read."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Literal

import pandas
import pytest
from connito.errors import Invalid

from tests.support.reading import account, rows, texts

CELLS = [
    "plain",
    "with, comma",
    "with; semicolon",
    "with\ttab",
    "with | bar",
    'with "quotes"',
    "two\nlines",
    "",
    "größer",
    "'single'",
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_delimiter_and_way_of_quoting(
    tmp_path: Path, delimiter: str, quoting: Literal[0, 1, 2], end: str
) -> None:
    rng = random.Random(1)
    table = [{"text": rng.choice(CELLS) + str(i), "note": rng.choice(CELLS), "n": str(i)} for i in range(60)]
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "note", "n"], delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows(table)
    (tmp_path / "a.csv").write_bytes(out.getvalue().encode())

    assert rows(tmp_path / "a.csv") == table
    read = pandas.read_csv(tmp_path / "a.csv", sep=delimiter, dtype=str, keep_default_na=False)
    assert rows(tmp_path / "a.csv") == read.to_dict("records")


def test_a_cell_of_any_size(tmp_path: Path) -> None:
    chapter = "a sentence of a chapter, with a comma. " * 30_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["short"], [chapter], ["after"]])

    assert texts(tmp_path / "a.csv") == ["short", chapter.strip(), "after"]


def test_what_excel_writes_in_europe(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefftext;nummer\r\n"ein Satz, mit Komma";1\r\nnoch einer;"2,5"\r\n')
    (tmp_path / "sep.csv").write_text("sep=;\r\ntext;nummer\r\nein Satz;1\r\n")
    (tmp_path / "unicode.txt").write_text("text\tnumber\r\na sentence, here\t1\r\nanother\t2\r\n", "utf-16")

    assert rows(tmp_path / "a.csv") == [
        {"text": "ein Satz, mit Komma", "nummer": "1"},
        {"text": "noch einer", "nummer": "2,5"},
    ]
    assert rows(tmp_path / "sep.csv") == [{"text": "ein Satz", "nummer": "1"}]
    assert texts(tmp_path / "unicode.txt", "{text}") == ["a sentence, here", "another"]


def test_quotes_as_databases_write_them(tmp_path: Path) -> None:
    (tmp_path / "mysql.csv").write_text('id,text\n1,"she said \\"yes\\", twice"\n2,"no"\n')
    (tmp_path / "raw.tsv").write_text('id\ttext\n1\ta 5" pipe\n2\tan "odd quote\n')

    assert [row["text"] for row in rows(tmp_path / "mysql.csv")] == ['she said "yes", twice', "no"]
    assert [row["text"] for row in rows(tmp_path / "raw.tsv")] == ['a 5" pipe', 'an "odd quote']


def test_one_column_with_commas_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nFirst, a sentence.\nThen, after a while, another\nlast\n")

    assert texts(tmp_path / "a.csv") == ["First, a sentence.", "Then, after a while, another", "last"]


def test_an_index_of_pandas_and_short_rows(tmp_path: Path) -> None:
    pandas.DataFrame({"text": ["one", "two"], "n": [1, None]}).to_csv(tmp_path / "a.csv")
    (tmp_path / "short.csv").write_text("text,a,b\none,1,2\ntwo,1\nthree,1,2,3\nfour,1,2\n")

    assert rows(tmp_path / "a.csv")[0] == {"column 1": "0", "text": "one", "n": "1.0"}
    assert [row["text"] for row in rows(tmp_path / "short.csv")] == ["one", "two", "four"]
    assert rows(tmp_path / "short.csv")[1]["b"] is None
    assert account(tmp_path / "short.csv").dropped == {"rows with more cells than the header": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("This is a sentence of the text.\nAnother sentence.\n", "a.csv:1 is no header"),
        ("1,This is a sentence\n2,another\n", "a.csv:1 is no header: '1'"),
        ("1,2,3\n4,5,6\n", "a.csv:1 is no header: '1'"),
        ("text,text\na,b\n", "names the column 'text' twice"),
        ('text,n\n"fine",1\n"never closed,2\nmore,3\n', "a.csv:3 is not a row of a table"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(content)

    with pytest.raises(Invalid) as caught:
        rows(tmp_path / "a.csv")
    assert said in str(caught.value)


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    from connito.data.reading.reader import Reading

    (tmp_path / "a.csv").write_text('text,n\n"two\nlines",1\nnext,2\n\nlast,3\n')

    assert [row.where.rpartition(":")[2] for row in Reading(tmp_path / "a.csv")] == ["2", "4", "6"]


def test_headers_of_surveys_and_pivots(tmp_path: Path) -> None:
    (tmp_path / "survey.csv").write_text('"What did you like, and why?","Anything\nelse?"\n"The colour, mostly.",no\n')
    pandas.DataFrame([["a", "b"], ["c", "d"]]).to_csv(tmp_path / "pivot.csv")

    assert texts(tmp_path / "survey.csv", "{What did you like, and why?}") == ["The colour, mostly."]
    assert texts(tmp_path / "pivot.csv", "{0}{1}") == ["ab", "cd"]


def test_the_end_of_a_file_of_ms_dos(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n\r\none,1\r\n\x1a")

    assert rows(tmp_path / "a.csv") == [{"text": "one", "n": "1"}]


def test_prose_is_no_table(tmp_path: Path) -> None:
    poem = "Roses are red, violets are blue\nSugar is sweet, and so are you\nLemons are sour, honey is too\n"
    (tmp_path / "a.txt").write_text(poem)
    (tmp_path / "b.md").write_text("| a | b |\n| - | - |\n| 1 | 2 |\n| 3 | 4 |\n")

    assert texts(tmp_path / "a.txt") == [poem.strip()]
    assert len(texts(tmp_path / "b.md")) == 1
