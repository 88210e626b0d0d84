"""What is shown of a log when a program has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.platform.spawning import last_lines

DUMP = "".join(f"goroutine {number} [running]:\n" for number in range(300))


@pytest.mark.parametrize(
    "why",
    [
        "F1126 17:43:13.645974 s3.go:422 S3 API Server Fail to serve: too many open files",
        "fatal error: failed to reserve page summary memory",
        "panic: no space left on device",
        "[7] 2026/11/26 17:43:13.645974 [FTL] Error listening on port: 127.0.0.1:4222",
    ],
)
def test_the_reason_is_shown_rather_than_what_a_program_was_doing(tmp_path: Path, why: str) -> None:
    (tmp_path / "log").write_text(f"I1126 started\n{why}\n{DUMP}")
    assert last_lines(tmp_path / "log") == f"  {why}"


def test_without_one_the_end_is_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\ntwo\nthree\n")
    assert last_lines(tmp_path / "log", 2) == "  two\n  three"
    assert last_lines(tmp_path / "none") == ""
