"""A bar below the cell of a notebook, nothing anywhere else."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from connito.runtime.progress import below_the_cell, silent


class Shown:
    """What a notebook drew, and drew anew in its place."""

    def __init__(self) -> None:
        self.drawn: list[dict[str, str]] = []
        self.moved: list[dict[str, str]] = []

    def display(self, drawn: dict[str, str], **_: Any) -> Shown:
        self.drawn.append(drawn)
        return self

    def update(self, drawn: dict[str, str], **_: Any) -> None:
        self.moved.append(drawn)


def notebook(monkeypatch: pytest.MonkeyPatch, shell: object) -> Shown:
    shown, top, display = Shown(), ModuleType("IPython"), ModuleType("IPython.display")
    vars(top).update(get_ipython=lambda: shell, display=display)
    vars(display).update(display=shown.display)
    monkeypatch.setitem(sys.modules, "IPython", top)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_one_bar_is_drawn_and_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = notebook(monkeypatch, type("Shell", (), {"kernel": object()})())
    tell = below_the_cell()
    assert shown.drawn == []
    for share in (0.0, 0.5, 1.5):
        tell("reading <script>", share)
    assert [drawn["text/plain"] for drawn in (*shown.drawn, *shown.moved)] == [
        "  0%  reading <script>", " 50%  reading <script>", "100%  reading <script>"
    ]  # fmt: skip
    assert all("&lt;script&gt;" in drawn["text/html"] for drawn in (*shown.drawn, *shown.moved))
    assert len(shown.drawn) == 1


def test_elsewhere_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert below_the_cell() is silent
    for shell in (None, object()):
        notebook(monkeypatch, shell)
        assert below_the_cell() is silent
