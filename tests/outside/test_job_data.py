"""`connito job check` and `connito select` on data files as people have them: the same answer for the same text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from connito.cli import main

from tests.support.models import one_thread, random_base
from tests.support.reading import tree

__all__ = ["one_thread", "random_base"]

WORDS = "valve pressure gasket rotor bearing shaft seal torque flange coupling impeller housing lubricant größer"
GENERAL = "river harvest lantern meadow orchard village bell winter bread song"


def documents(words: str, count: int, seed: int) -> list[str]:
    """Texts of generated words."""
    rng = random.Random(seed)
    return [
        " ".join(f"{rng.choice(words.split())} {rng.randint(1, 99)}" for _ in range(40)) + "." for _ in range(count)
    ]


TEXTS = documents(WORDS, 60, 1)


def table(delimiter: str) -> str:
    """The texts as a table."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["nummer", "text"], *enumerate(TEXTS)])
    return out.getvalue()


def parquet() -> bytes:
    """The texts as Parquet."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), buffer)
    return buffer.getvalue()


LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
FILES: dict[str, dict[str, bytes | str]] = {
    "lines": {"d.jsonl": LINES},
    "array": {"d.json": json.dumps([{"text": text} for text in TEXTS], indent=1)},
    "utf-16 of PowerShell": {"d.jsonl": LINES.replace("\n", "\r\n").encode("utf-16")},
    "latin-1": {"d.csv": table(",").encode("latin-1")},
    "semicolons of Excel": {"d.csv": "\ufeff" + table(";")},
    "gzip": {"d.jsonl.gz": gzip.compress(LINES.encode())},
    "parquet": {"d.parquet": parquet()},
    "gzip under another name": {"d.txt": gzip.compress(LINES.encode())},
    "clone": {"d/README.md": "# About\n\n" + "words of the card. " * 400, "d/data/train-0.parquet": parquet()},
    "empty rows between": {"d.jsonl": LINES + '{"text": null}\n{"text": NaN}\n{"text": ""}\n'},
}  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any, str]]:
    """A command in this process: exit code, its JSON if it printed one, what it said."""

    def call(*arguments: object) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "argv", ["connito", *map(str, arguments), "--json"])
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return int(code), json.loads(said.out) if said.out.startswith("{") else None, said.err

    return call


def job(tmp_path: Path, base: Path, files: dict[str, bytes | str], **source: str) -> Path:
    """A job beside its data."""
    first = next(iter(files)).split("/")[0]
    general = "".join(json.dumps({"text": text}) + "\n" for text in documents(GENERAL, 30, 2))
    content = {
        "domain": "pumps", "base": str(base), "data": [{"path": first, **source}], "license": "CC-BY-4.0",
        "data_statement": "generated",
        "general": [{"path": "general.jsonl", "domain": "village"}],
        "policies": {"training": {"sequence_length": 64, "local_steps": 2, "batch_sequences": 4}},
    }  # fmt: skip
    tree(tmp_path, {**files, "general.jsonl": general, "job.yaml": json.dumps(content)})
    return tmp_path / "job.yaml"


def check(run: Callable[..., Any], file: Path) -> tuple[int, Any, str]:
    """Check a job without a platform."""
    result: tuple[int, Any, str] = run("job", "check", file, "--data-dir", file.parent / "none")
    return result


@pytest.mark.parametrize("kind", FILES)
def test_a_job_is_the_same_from_every_kind_of_file(
    kind: str, run: Callable[..., Any], random_base: Path, tmp_path: Path
) -> None:
    code, said, _ = check(run, job(tmp_path / "a", random_base, FILES[kind]))
    _, expected, _ = check(run, job(tmp_path / "b", random_base, FILES["lines"]))

    assert (code, said["ok"]) == (0, True)
    assert said["parts"] == expected["parts"]
    (reach,) = (row for row in said["findings"] if row["check"] == "reach" and row["detail"].startswith("data"))
    assert reach["numbers"]["rows"] - reach["numbers"]["empty"] == len(TEXTS)
    assert reach["numbers"]["files"] == 1
    assert reach["numbers"]["bytes"] > 0


@pytest.mark.parametrize("kind", ["gzip", "parquet", "utf-16 of PowerShell", "clone", "semicolons of Excel"])
def test_a_selection_is_the_same_from_every_kind_of_file(
    kind: str, run: Callable[..., Any], random_base: Path, tmp_path: Path
) -> None:
    picks = {}
    for name in ("lines", kind):
        place = tree(tmp_path / name, FILES[name]) / next(iter(FILES[name])).split("/")[0]
        code, said, err = run("select", "--base", random_base, "--data", place, "--max-experts", "4")
        assert code == 0, err
        picks[name] = said["layers"], said["mass"]
        (read,) = said["diagnostics"]["read"].values()
        assert (read["files"], read["rows"] - read["empty"]) == (1, len(TEXTS))

    assert picks[kind] == picks["lines"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"d.jsonl": LINES + '{"text": "cut'}, "d.jsonl:61 is not JSON"),
        ({"d.parquet": b"PAR1" + bytes(400) + b"PAR1"}, "d.parquet is parquet that cannot be read"),
        ({"d.jsonl": '{"titel": "a", "n": 1}\n'}, "d.jsonl:1 has no `text`; its fields are n, titel"),
        ({"d.txt": bytes(range(256)) * 20}, "d.txt is binary"),
        ({"d.csv": "1,2\n3,4\n"}, "d.csv:1 is no header"),
        ({"d/a.jsonl": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}, "run `git lfs pull`"),
        ({"d/README.md": "# card", "d/d.py": "x"}, "never run"),
    ],
)
def test_what_cannot_be_read_is_exit_3_with_file_line_and_remedy(
    files: dict[str, bytes | str], said: str, run: Callable[..., Any], random_base: Path, tmp_path: Path
) -> None:
    code, document, _ = check(run, job(tmp_path, random_base, files))

    assert code == 3
    errors = [row["detail"] for row in document["findings"] if row["level"] == "error" and row["check"] == "reach"]
    assert len(errors) == 1
    assert said in errors[0]

    place = tmp_path / next(iter(files)).split("/")[0]
    code, _, err = run("select", "--base", random_base, "--data", place)
    assert code in (3, 4)
    assert said in err


def test_an_address_that_does_not_answer_is_exit_5(run: Callable[..., Any], random_base: Path, tmp_path: Path) -> None:
    file = job(tmp_path, random_base, {"d.jsonl": LINES})
    file.write_text(file.read_text().replace('"d.jsonl"', '"http://127.0.0.1:9/d.jsonl"'))
    code, _, err = check(run, file)

    assert code == 5
    assert "http://127.0.0.1:9/d.jsonl cannot be reached" in err


def test_what_was_left_out_is_said_in_numbers(run: Callable[..., Any], random_base: Path, tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "d/a.jsonl": LINES + '{"text": "\\ud800 broken"}\n[1]\n', "d/b.csv": "text,n\n" + "a,b,c\n" * 2,
        "d/photo.png": b"\x89PNG",
        "d/test-0.jsonl": LINES, "d/train-0.jsonl": '{"text": "one more row of words for the training"}\n', "d/.hidden": "x",
    }  # fmt: skip
    code, said, _ = check(run, job(tmp_path, random_base, files))

    assert code == 0
    (reach,) = (row for row in said["findings"] if row["check"] == "reach" and row["detail"].startswith("data"))
    numbers = reach["numbers"]
    assert numbers["skipped"] == {"hidden or of the system": 1, ".png files": 1, "of another split": 1}
    assert numbers["dropped"] == {
        "broken characters replaced": 1, "rows without fields": 1, "rows with more cells than the header": 2,
    }  # fmt: skip
    assert "1 .png files" in reach["detail"]
    assert "2 rows with more cells than the header" in reach["detail"]
