"""How a job's text is parted, on real text: the source of the standard library."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from connito.jobs.findings import Finding, require
from connito.jobs.spec import Job, parse_job
from connito.jobs.texts import Texts, sort_texts, weighted


def functions(*modules: Any) -> list[str]:
    found = []
    for module in modules:
        for _, thing in inspect.getmembers(module, inspect.isfunction):
            source = textwrap.dedent(inspect.getsource(thing))
            if thing.__module__ == module.__name__ and len(source) > 200:
                found.append(source)
    return found


@pytest.fixture(scope="session")
def code() -> list[str]:
    import argparse
    import ast
    import shutil
    import statistics
    import tarfile
    import textwrap as wrap

    return functions(statistics, shutil, argparse, ast, tarfile, wrap)


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def job(**fields: float | list[dict[str, str]] | str) -> Job:
    return parse_job({"domain": "code", "data": [{"path": "data.jsonl"}], "license": "PSF-2.0", **fields})


def found(texts: Texts, check: str) -> list[Finding]:
    return [finding for finding in texts.findings if finding.check == check]


def test_parts_are_disjoint_and_the_same_again(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", code)

    one, two = sort_texts(job(), tmp_path), sort_texts(job(), tmp_path)

    parts = [{document.text for document in part} for part in (one.probe, one.train, one.holdout)]
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert list(one.train) == list(two.train)
    assert not [finding for finding in one.findings if finding.level == "error"]


WORDS = [f"{first}{second} " for first in "abcdefgh" for second in "klmnopqr"]


def test_copies_are_found_within_and_across_sources(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [*code[:20], code[0].upper()])
    write(tmp_path / "more.jsonl", [code[3], *code[20:30]])

    texts = sort_texts(job(data=[{"path": "data.jsonl"}, {"path": "more.jsonl"}]), tmp_path)

    (finding,) = found(texts, "duplicates")
    assert finding.level == "ok"
    assert "data.jsonl: 1 repeat a document of its own, 0 one of another source" in finding.detail
    assert "more.jsonl: 0 repeat a document of its own, 1 one of another source" in finding.detail


def test_all_duplicates_is_an_error(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [code[0]] * 50)

    texts = sort_texts(job(), tmp_path)

    (finding,) = found(texts, "duplicates")
    assert finding.level == "error"
    assert "49 of 50 documents repeat another one (49 exactly" in finding.detail
    assert finding.remedy.startswith("1 different document: too few to train on some and judge by others")
    assert finding.remedy.endswith("add text that is not a copy")


def test_one_document_is_not_called_a_copy(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [code[0][:1500]])

    texts = sort_texts(job(), tmp_path)

    assert not found(texts, "duplicates")
    (finding,) = found(texts, "size")
    assert (finding.level, finding.remedy) == ("error", "add text")
    assert finding.detail == "1 different document: too few to train on some and judge by others"


def test_a_few_long_rows_are_passages_as_the_same_plain_text_is(code: list[str], tmp_path: Path) -> None:
    long = "\n\n".join(code)
    (tmp_path / "data.txt").write_text(long)
    write(tmp_path / "data.jsonl", [long])

    rows, plain = (sort_texts(job(data=[{"path": f"data.{suffix}"}]), tmp_path) for suffix in ("jsonl", "txt"))

    assert not [finding for finding in rows.findings if finding.level == "error"]
    assert [document.text for document in rows.train] == [document.text for document in plain.train]
    (said,) = [finding.detail for finding in found(rows, "reach") if "passages" in finding.detail]
    assert said.startswith("1 row of data, cut into ")
    assert not [finding for finding in found(plain, "reach") if "passages" in finding.detail]
    # As many rows as can be parted are documents of their own, however long.
    write(tmp_path / "data.jsonl", [long[number * 5000 : number * 5000 + 5000] for number in range(20)])
    kept = sort_texts(job(), tmp_path)
    assert all(len(document.text) > 2000 for document in (*kept.train, *kept.holdout))
    assert not [finding.detail for finding in found(kept, "reach") if "passages" in finding.detail]


def test_a_conversation_is_never_cut(tmp_path: Path) -> None:
    said = [
        {"role": role, "content": f"{role} {number} " * 900} for number in range(2) for role in ("user", "assistant")
    ]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": said}) + "\n")

    assert [finding.detail for finding in found(sort_texts(job(), tmp_path), "size")] == [
        "1 different document: too few to train on some and judge by others"
    ]


@pytest.mark.parametrize(("rows", "level"), [(0, "error"), (40, "warning")])
def test_documents_that_share_a_template_are_told_why_nothing_is_left(
    code: list[str], rows: int, level: str, tmp_path: Path
) -> None:
    template = "This is the same long header that every document of ours begins with, word for word. " * 5
    write(tmp_path / "data.jsonl", [*(f"{template} {word * 40}" for word in WORDS), *code[:rows]])

    told = found(sort_texts(job(), tmp_path), "contamination")

    assert [finding.level for finding in told] == [level]
    assert "which share most of their text with held-out ones: take out what documents have in common" in told[0].remedy


def test_words_of_the_jobs_own_template_are_no_copies(code: list[str], tmp_path: Path) -> None:
    """A template longer than what it frames makes no two rows alike, and none of them held-out text."""
    short = [" ".join(text.split())[:160] for text in code[:150]]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"code": text, "n": n}) + "\n" for n, text in enumerate(short))
    )
    frame = (
        "Below is a piece of Python, as it stands in the library of the language, number {n} of those that were drawn: "
    )
    frame += "{code}\n\nSay in a few plain words what this piece of code is for, and to whom it may be of use one day."
    data: list[dict[str, str]] = [{"path": "rows.jsonl", "text": frame}]
    plain = sort_texts(job(data=[{"path": "rows.jsonl", "text": "{code}"}]), tmp_path)
    framed = sort_texts(job(data=data), tmp_path)
    for check, number in (("duplicates", "near"), ("contamination", "dropped")):
        (one,), (two,) = found(plain, check), found(framed, check)
        assert (two.level, two.numbers[number]) == (one.level, pytest.approx(one.numbers[number], abs=3))
    assert all(document.text.startswith("Below is a piece of Python") for document in framed.train)


def test_files_are_named_as_the_job_names_them(code: list[str], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    write(tmp_path / "own" / "data.jsonl", code)
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.4\n" + b"0" * 600)
    texts = sort_texts(job(data=[{"path": "own"}, {"path": "x.pdf"}, {"path": "none.txt"}]), tmp_path)
    assert {document.where.partition(":")[0].partition("#")[0] for document in texts.train} == {"own/data.jsonl"}
    pdf, none = (finding.detail for finding in found(texts, "reach") if finding.level == "error")
    assert pdf.startswith("data: x.pdf is a PDF")
    assert none == f"data: there is no file or folder none.txt; relative paths begin at {tmp_path}"


def test_a_contaminated_hold_out_is_refused_with_examples_or_dropped_from_training(
    code: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "data.jsonl", code[:40])
    write(tmp_path / "held.jsonl", [*code[40:50], *code[:10]])

    refused = sort_texts(job(holdout=[{"path": "held.jsonl"}]), tmp_path)
    dropped = sort_texts(job(holdout=[{"path": "held.jsonl"}], contamination="drop"), tmp_path)

    (finding,) = found(refused, "contamination")
    assert finding.level == "error"
    assert finding.numbers["found"] >= 10
    assert "(first: held.jsonl:11," in finding.remedy
    assert "contamination: drop" in finding.remedy
    (finding,) = found(dropped, "contamination")
    assert finding.level == "warning"
    held, trained = {document.text for document in dropped.holdout}, {document.text for document in dropped.train}
    assert len(held) == 20
    assert not held & trained


def test_a_benchmark_in_the_training_data_is_found(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", code[:40])
    write(tmp_path / "exam.jsonl", code[:5])

    texts = sort_texts(job(benchmarks=[{"name": "exam", "path": "exam.jsonl"}]), tmp_path)

    finding = next(finding for finding in found(texts, "contamination") if "benchmark exam" in finding.detail)
    assert finding.level == "error"
    assert finding.numbers["share"] >= 0.5


def test_a_benchmark_that_is_the_hold_out_is_told(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", code[:40])
    write(tmp_path / "held.jsonl", code[40:60])

    benchmarks = [{"name": "exam", "path": "held.jsonl"}]
    texts = sort_texts(job(holdout=[{"path": "held.jsonl"}], benchmarks=benchmarks), tmp_path)

    told = [finding for finding in found(texts, "contamination") if "also in the hold-out" in finding.detail]
    assert [(finding.level, finding.numbers["share"]) for finding in told] == [("warning", 1.0)]


def test_every_unreadable_source_is_told_at_once(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", code[:20])
    (tmp_path / "empty.txt").write_text("")
    sources = [{"path": "missing.txt"}, {"path": "empty.txt"}, {"path": "data.jsonl", "text": "{body}"}]

    texts = sort_texts(job(data=sources), tmp_path)

    said = [finding.detail for finding in texts.findings if finding.level == "error"]
    assert any("there is no file or folder" in line for line in said)
    assert any("empty.txt holds no text" in line for line in said)
    assert any("has no field 'body'" in line for line in said)
    with pytest.raises(Exception, match="the job has 3 problems"):
        require(texts.findings)


def test_replay_text_is_not_held_out(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", code[:20])
    write(tmp_path / "general.jsonl", code[20:])

    general = [{"domain": "other", "path": "general.jsonl"}]
    whole = sort_texts(job(general=general), tmp_path)
    parted = sort_texts(job(general=general, replay=0.2), tmp_path)

    assert not whole.replay
    held, replayed = set(parted.general["other"]), set(parted.replay["other"])
    assert held
    assert replayed
    assert not held & replayed
    assert held | replayed <= set(whole.general["other"])


def test_weights_are_how_often_a_document_is_seen(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", code)
    documents = sort_texts(job(), tmp_path).train

    assert list(weighted(documents, [1.0])) == list(documents)
    assert len(weighted(documents, [3.0])) == 3 * len(documents)
    half = len(weighted(documents, [0.5])) / len(documents)
    assert 0.3 < half < 0.7


def test_the_probe_of_a_very_large_job_is_bounded(
    code: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data.jsonl", code)
    whole = sort_texts(job(), tmp_path)
    monkeypatch.setattr("connito.jobs.texts.PROBE_CHARACTERS", 1)
    bounded = sort_texts(job(), tmp_path)

    assert len(whole.probe) > len(bounded.probe) == 1
    assert {d.text for d in (*bounded.probe, *bounded.train)} == {d.text for d in (*whole.probe, *whole.train)}
    assert list(bounded.holdout) == list(whole.holdout)


def test_a_source_that_cannot_be_read_to_its_end_leaves_nothing(code: list[str], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", code)
    (tmp_path / "cut.jsonl").write_text('{"text": "only in the file that is cut off"}\n{"text": "')

    texts = sort_texts(job(data=[{"path": "data.jsonl"}, {"path": "cut.jsonl"}]), tmp_path)
    assert [finding.check for finding in texts.findings if finding.level == "error"] == ["reach"]
    assert all("cut off" not in document.text for document in (*texts.train, *texts.probe, *texts.holdout))


def test_whoever_waits_is_told(code: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data.jsonl", code)
    monkeypatch.setattr("connito.jobs.texts._TOLD", 5)
    told: list[tuple[str, float]] = []
    sort_texts(job(), tmp_path, lambda what, share: told.append((what, share)))

    assert told[0] == ("reading data.jsonl: 5 documents", 0.2)
    assert any(what.startswith("comparing ") for what, _ in told)
    assert [share for _, share in told] == sorted(share for _, share in told)
