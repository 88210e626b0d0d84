"""Output on terminals and into pipes that are not UTF-8."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from connito.cli import main
from connito.cli.app import app

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "shift_jis"]


def verbs(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb, by its words."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, (*path, name))


VERBS = sorted(verbs(typer.main.get_command(app)))


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code and output of a command on a terminal of some encoding, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["connito", *arguments])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as ended:
        main()
    texts = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]
    return int(ended.value.code or 0), *texts  # type: ignore[return-value]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("verb", [(), ("up",), ("select",)])
def test_help_is_printed(monkeypatch: pytest.MonkeyPatch, encoding: str, verb: tuple[str, ...]) -> None:
    code, out, _ = printed(monkeypatch, encoding, *verb, "--help")
    assert (code, "Usage: connito" in out) == (0, True)


@pytest.mark.slow
def test_the_help_of_every_verb_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(VERBS) > 40
    for verb in VERBS:
        code, out, _ = printed(monkeypatch, "ascii", *verb, "--help")
        assert (code, "Usage: connito" in out) == (0, True), verb


def test_what_ascii_has_not_is_printed_as_something_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = printed(monkeypatch, "ascii", "--help")
    lines = [line for line in out.splitlines() if "--version" in line]

    assert lines
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    assert "?" not in out.replace("[?", "")


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8"])
def test_names_that_no_encoding_has_are_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = printed(monkeypatch, encoding, "job", "check", os.fsdecode(b"gr\xf6\xdfe-\xe6\x97\xa5.yaml"))

    assert code == 4
    assert "there is no file" in err


def test_a_program_of_its_own() -> None:
    program = [sys.executable, "-c", "from connito.cli import main; main()", "up", "--help"]
    done = subprocess.run(program, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Usage: " in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize("name", ["größe", "日"])
def test_files_with_such_names_are_found_where_the_locale_is_another(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.txt").write_text("Some words of it.")
    text = f"{{domain: words, base: tiny, profile: tiny, license: MIT, data_statement: ours, data: [{{path: {name}.txt}}]}}"
    (tmp_path / "job.yaml").write_bytes(text.encode())
    program = [sys.executable, "-P", "-m", "connito.cli", "job", "check", "job.yaml"]
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, check=False)

    assert done.returncode == 3
    assert b"1 row in 1 file; 1 as text" in done.stdout
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("options", [["-X", "utf8=0"], ["-I", "-X", "utf8=0"]])
def test_where_python_is_told_not_to_use_utf_8_a_command_begins_once_more_and_no_more(options: list[str]) -> None:
    program = [sys.executable, *options, "-c", "from connito.cli import main; main()", "up", "--help"]
    env = {**os.environ, "LC_ALL": "C"} | {"PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(program, env=env, capture_output=True, check=False, timeout=60)

    assert done.returncode == 0
    assert b"Usage: " in done.stdout


def test_a_platform_s_folder_without_a_name_in_utf_8_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = printed(monkeypatch, "utf-8", "up", "--base", "tiny", "--data-dir", os.fsdecode(b"gr\xf6"))

    assert code == 3
    assert "not in UTF-8; choose another by --data-dir" in err


def test_a_reader_who_leaves_is_no_failure() -> None:
    source = """
import typer
from connito.runtime.exits import explained
app = typer.Typer()
@app.command()
def up() -> None:
    raise BrokenPipeError(32, "Broken pipe")
with explained():
    app([])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
