"""Text in the encodings that programs and people leave it in."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path

import pytest
from connito.errors import Invalid

from tests.support.reading import account, rows, texts

SENTENCES = {
    "cp1252": "Le café était fermé, mais la boulangerie à côté vendait des gâteaux délicieux — “très bons”.",
    "latin-1": "Die Prüfung der Ventile erfolgte gemäß Vorschrift, größere Mängel wurden nicht gefunden.",
    "cp1250": "Zażółć gęślą jaźń, sprawdzono zawory i ciśnienie w układzie jest prawidłowe.",
    "cp1251": "Проверка клапанов показала, что давление в системе соответствует норме и насос исправен.",
    "koi8-r": "Проверка клапанов показала, что давление в системе соответствует норме и насос исправен.",
    "cp1253": "Ο έλεγχος των βαλβίδων ολοκληρώθηκε και η πίεση του συστήματος είναι κανονική.",
    "shift_jis": "バルブの点検を行い、圧力は正常であることを確認しました。ポンプは問題なく動作しています。",
    "euc_jp": "バルブの点検を行い、圧力は正常であることを確認しました。ポンプは問題なく動作しています。",
    "gb18030": "阀门检查完毕，系统压力正常，水泵运行良好。请在下个月之前再次检查。",
    "big5": "閥門檢查完畢，系統壓力正常，水泵運行良好。請在下個月之前再次檢查。",
    "euc_kr": "밸브 점검을 완료했으며 시스템 압력은 정상이고 펌프는 양호합니다.",
}
WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
MARKS = dict(
    zip(WIDE, [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE], strict=True)
)


@pytest.mark.parametrize("encoding", SENTENCES)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_older_encodings_are_told_apart_and_named_with_a_confidence(tmp_path: Path, encoding: str, name: str) -> None:
    sentence = SENTENCES[encoding]
    written = {
        "a.txt": sentence,
        "a.csv": f"text\n{sentence.replace(',', '')}\n",
        "a.jsonl": json.dumps({"text": sentence}, ensure_ascii=False),
    }[name]
    (tmp_path / name).write_bytes(written.encode(encoding))

    expected = sentence.replace(",", "") if name == "a.csv" else sentence
    assert texts(tmp_path / name) == [expected]
    found = account(tmp_path / name)
    assert len(found.encodings) == 1
    assert "utf-8" not in found.encodings
    assert any("confidence" in note for note in found.notes)


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("sentence", ["Valve, opened.", "圧力は正常 0,5", "Проверка, клапанов"])
def test_wide_encodings_with_and_without_a_mark(tmp_path: Path, encoding: str, marked: bool, sentence: str) -> None:
    text = f'text\tn\r\n"{sentence}"\t1\r\n"{sentence}"\t2\r\n'
    (tmp_path / "a.txt").write_bytes((MARKS[encoding] if marked else b"") + text.encode(encoding))

    assert rows(tmp_path / "a.txt") == [{"text": sentence, "n": "1"}, {"text": sentence, "n": "2"}]
    assert account(tmp_path / "a.txt").encodings == {encoding: 1}


def test_a_mark_of_utf_8_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext;n\r\nx;1\r\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")

    assert rows(tmp_path / "a.jsonl") == [{"text": "x"}]
    assert rows(tmp_path / "a.csv") == [{"text": "x", "n": "1"}]
    assert texts(tmp_path / "a.txt") == ["x"]


def test_the_first_odd_byte_may_come_late(tmp_path: Path) -> None:
    lines = [f"plain line {number}" for number in range(40_000)] + ["größere Mängel"]
    (tmp_path / "a.jsonl").write_bytes(
        "\n".join(json.dumps({"text": x}, ensure_ascii=False) for x in lines).encode("latin-1")
    )

    assert texts(tmp_path / "a.jsonl") == lines


def test_a_few_broken_bytes_in_utf_8_are_replaced_and_counted(tmp_path: Path) -> None:
    good = "Проверка клапанов, größere Mängel. " * 20
    (tmp_path / "a.txt").write_bytes(good.encode() + b"\xff\xfe and \xc3 end " + good.encode())

    (text,) = texts(tmp_path / "a.txt")
    assert text == f"{good}\ufffd\ufffd and \ufffd end {good}".strip()
    assert account(tmp_path / "a.txt").dropped == {"broken characters replaced": 3}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 262_143, 262_144, 262_145])
def test_characters_across_the_edges_of_pieces(tmp_path: Path, size: int) -> None:
    text = "x" * size + "日本語 größer"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), "utf-16")

    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.jsonl") == [text]


def test_nul_bytes_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one text" * 50 + b"\0" + b"and more" * 50)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\u0000b"}')

    assert "\0" not in texts(tmp_path / "a.txt")[0]
    assert account(tmp_path / "a.txt").dropped == {"control characters removed": 1}
    assert texts(tmp_path / "a.jsonl") == ["ab"]


def test_line_ends_of_every_system(tmp_path: Path) -> None:
    for name, end in (("dos", "\r\n"), ("unix", "\n"), ("mac", "\r")):
        (tmp_path / f"{name}.csv").write_bytes(end.join(["text,n", "one,1", '"two, and', 'more",2', ""]).encode())
        assert rows(tmp_path / f"{name}.csv") == [{"text": "one", "n": "1"}, {"text": "two, and\nmore", "n": "2"}]


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (bytes(range(256)) * 8, "binary"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "a picture"),
        (b"SQLite format 3\0" + b"\0" * 50, "a database"),
        (b"\xd0\xcf\x11\xe0" + b"\0" * 50, "an Office document"),
    ],
)
def test_what_is_no_text_says_what_it_is(tmp_path: Path, raw: bytes, what: str) -> None:
    (tmp_path / "a.txt").write_bytes(raw)

    with pytest.raises(Invalid, match=f"a.txt is {what}"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "".join(chr(ord("A") + i * 7 % 26) + chr(ord("a") + i * 5 % 26) + str(i % 10) for i in range(400)),
            "encoded bytes",
        ),
        ("\n".join(f"{i:064x}  data/train-{i}.parquet" for i in range(10**60, 10**60 + 9)), "a list of files"),
        ("\n".join(f"-rw-r--r-- 1 root root {i} Nov 26 10:00 file{i}.txt" for i in range(9)), "a list of files"),
        ("./a/b.txt\n./a/c.txt\n./d.json\n", "a list of files"),
    ],
)
def test_characters_that_nobody_wrote_to_be_read(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "a.txt").write_text(text)

    with pytest.raises(Invalid, match=f"a.txt is {what}"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text", ["ACGTTGCA" * 60, "MKVLAAGIVGLLLAQWERTY" * 20, "ก" * 300, "圧力" * 200, "1234567890 " * 30, "x" * 400]
)
def test_text_without_spaces_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)

    assert texts(tmp_path / "a.txt") == [text.strip()]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes("größere Mängel".encode("latin-1"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(20))
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    for module in ("charset_normalizer", "pyarrow", "zstandard", "fsspec"):
        monkeypatch.setitem(sys.modules, module, None)

    for name in (tmp_path / "a.txt", tmp_path / "a.parquet", tmp_path / "a.zst", "https://127.0.0.1/a.jsonl"):
        with pytest.raises(Invalid, match=r"pip install 'connito\[data\]'"):
            rows(name)
