"""Folders as they are: hidden and system files, links in circles, pipes, names of every kind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from connito.data.reading.reader import Reading
from connito.data.reading.texts import texts_of
from connito.errors import Invalid, NotFound

from tests.support.reading import account, rows, texts, tree

LINE = '{"text": "kept"}\n'


def test_what_the_system_and_tools_leave_is_not_read(tmp_path: Path) -> None:
    tree(
        tmp_path / "d",
        {
            "a.jsonl": LINE, ".DS_Store": b"\0\0\0\1Bud1", ".git/config": "[core]\n", ".git/x.jsonl": LINE,
            "Thumbs.db": b"\xd0\xcf",
            "desktop.ini": "[x]", "__MACOSX/._a.jsonl": b"\0\5", "sub/._a.jsonl": LINE,
            "node_modules/p/data.json": '{"text": "no"}',
            "__pycache__/a.pyc": b"\0", ".ipynb_checkpoints/a.jsonl": LINE, "script.py": "print()", "picture.png": b"\x89PNG",
        },
    )  # fmt: skip

    assert texts(tmp_path / "d") == ["kept"]
    skipped = account(tmp_path / "d").skipped
    assert (skipped[".py files"], skipped[".png files"]) == (1, 1)
    assert skipped["hidden or of the system"] >= 4


def test_links_in_circles_end(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", {"a.txt": "one", "in/b.txt": "two"})
    (folder / "in" / "up").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "gone.txt").symlink_to("nowhere")
    tree(tmp_path / "other", {"c.txt": "three"})
    (folder / "linked").symlink_to(tmp_path / "other")

    assert texts(folder) == ["one", "two", "three"]
    assert account(folder).skipped["broken links, pipes, sockets or devices"] == 2


def test_pipes_sockets_and_devices_are_never_waited_for(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", {"a.txt": "one"})
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.txt"))

        assert texts(folder) == ["one"]
        for name in (folder / "pipe.txt", folder / "socket.txt", Path("/dev/zero")):
            with pytest.raises(Invalid, match="pipe, socket or device"):
                texts(name)


@pytest.mark.parametrize(
    "name", ["with space.txt", "größe 日本.txt", "-leading.txt", "a[1].txt", "quote's.txt", "new\nline.txt", "*.txt"]
)
def test_names_of_every_kind(tmp_path: Path, name: str) -> None:
    tree(tmp_path / "d", {name: "text of it"})

    assert texts(tmp_path / "d" / name) == texts(tmp_path / "d") == ["text of it"]


def test_globs(tmp_path: Path) -> None:
    tree(tmp_path, {"a.txt": "one", "b.txt": "two", "in/deep/c.md": "three", "in/d.py": "four = 4"})

    assert texts(tmp_path / "*.txt") == ["one", "two"]
    assert texts(tmp_path / "**" / "*.md") == ["three"]
    assert texts(tmp_path / "in" / "*.py") == ["four = 4"]
    with pytest.raises(NotFound, match="nothing matches"):
        texts(tmp_path / "*.jsonl")


def test_a_folder_named_like_a_file_and_a_file_without_a_suffix(tmp_path: Path) -> None:
    tree(tmp_path / "data.jsonl", {"part-00000": LINE, "part-00001": LINE, "_SUCCESS": "", "notes": "plain words"})

    assert texts(tmp_path / "data.jsonl") == ["kept", "kept"]
    assert account(tmp_path / "data.jsonl").skipped == {
        "about a data set": 1, "plain text under the name of no kind": 1,
    }  # fmt: skip


def test_files_about_the_data_are_not_the_data(tmp_path: Path) -> None:
    tree(
        tmp_path / "d",
        {"README.md": "# About\n\nwords", "LICENSE": "MIT", "LICENSE.txt": "MIT", "data/a.csv": "text,n\nkept,1\n"},
    )
    tree(tmp_path / "docs", {"README.md": "# Start here", "guide.md": "# Guide"})

    assert texts(tmp_path / "d") == ["kept"]
    assert texts(tmp_path / "docs") == ["# Start here", "# Guide"]


def test_files_with_other_fields_each(tmp_path: Path) -> None:
    tree(
        tmp_path / "d",
        {"a.csv": "content,n\none,1\n", "b.jsonl": '{"text": "two"}\n{"n": 1}\n', "c.csv": "body;n\nthree;1\n"},
    )

    assert texts(tmp_path / "d") == ["one", "two", "three"]
    reading = Reading(tmp_path / "d")
    assert len(list(texts_of(reading))) == 3
    assert reading.account.dropped == {"rows without text": 1}


def test_a_pointer_of_git_lfs_names_the_remedy(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    tree(tmp_path / "d", {"train.parquet": pointer, "a.jsonl": LINE})

    for location in (tmp_path / "d", tmp_path / "d" / "train.parquet"):
        with pytest.raises(Invalid, match=r"train.parquet is a pointer of Git LFS.*`git lfs pull`"):
            rows(location)


def test_a_file_that_changes_or_goes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINE * 10)
    reading = iter(Reading(path))
    next(reading)
    with path.open("a") as file:
        file.write(LINE)
    with pytest.raises(Invalid, match=r"a.jsonl changed while it was read"):
        list(reading)

    folder = tree(tmp_path / "d", {"a.jsonl": LINE, "b.jsonl": LINE})
    reading = iter(Reading(folder))
    next(reading)
    (folder / "b.jsonl").unlink()
    with pytest.raises(NotFound, match=r"b.jsonl is not there any more"):
        list(reading)


def test_what_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(Invalid, match=r"a.txt may not be read; allow it"):
        texts(tmp_path / "a.txt")


def test_a_folder_inside_that_may_not_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "d", {"a.txt": "x", "locked/b.txt": "y"})
    scan = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert account(tmp_path / "d").skipped == {"folders that may not be read": 1}


@pytest.mark.parametrize("location", ["x" * 5000, "a\0b", "", "nowhere/at/all", "~nobody/x"])
def test_paths_that_cannot_be(location: str, tmp_path: Path) -> None:
    with pytest.raises((Invalid, NotFound)) as caught:
        list(Reading(location, tmp_path))
    assert str(caught.value)


def test_a_folder_of_nothing_to_read_says_what_is_there(tmp_path: Path) -> None:
    tree(tmp_path / "d", {"a.png": b"\x89PNG", "b.png": b"\x89PNG", "c.py": "x = 1"})
    tree(tmp_path / "binary", {"a.txt": bytes(range(256)), "b.txt": bytes(range(256))})

    with pytest.raises(NotFound, match=r"holds no text to read \(2 .png files, 1 .py files\)"):
        rows(tmp_path / "d")
    with pytest.raises(NotFound, match=r"holds no text: .*a.txt is binary, and so are all 2 files"):
        rows(tmp_path / "binary")
