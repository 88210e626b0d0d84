"""A job.yaml as editors and people leave it: a job, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.errors import Invalid
from connito.jobs.spec import read_job

JOB = "domain: pumps\ndata: [{path: größe.jsonl}]\nlicense: MIT\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_jobs_of_every_editor(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "job.yaml").write_bytes(JOB.replace("\n", end).encode(encoding))

    assert read_job(tmp_path / "job.yaml").data[0].path == "größe.jsonl"


@pytest.mark.parametrize(
    "raw",
    [
        JOB.encode("latin-1"), b"", b"- a", b"{}", b"1: 2\n", b"\0", b"? [a]\n: b\n", b"<<: 3\n", b"a: &a [*a]\ndata: 1",
        b"[" * 5000, b"domain: 2020-99-99\n", b"a: !!int zz\n", b"a: !!timestamp x\n", b"a: !!float x\n", b"a: !!binary '%'\n",
        b"a: !!bool x\n", b"!!python/object/apply:os.system ['x']",
        b"domain: [1]\ndata: 3\nlicense: {a: b}\npolicies: {training: 3}\n",
        b"a: b: c\n",
    ],
)  # fmt: skip
def test_what_is_no_job_is_a_sentence(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "job.yaml").write_bytes(raw)

    with pytest.raises(Invalid, match=r"job.yaml"):
        read_job(tmp_path / "job.yaml")
