"""The notebooks of the docs, run one after the other in one folder, each by a kernel of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from connito.local.up import stop
from connito.platform.datadir import DataDir
from nbclient import NotebookClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NOTEBOOKS = Path(__file__).parents[2] / "docs/notebooks"
# As they build on each other.
ORDER = ("adapt", "compose", "serve")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """By notebook: what each of its cells showed. A cell that raises fails."""
    folder = tmp_path_factory.mktemp("notebooks")
    found = {}
    try:
        for name in ORDER:
            book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
            NotebookClient(book, timeout=280, resources={"metadata": {"path": str(folder)}}).execute()
            found[name] = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    finally:
        # What a cell started that failed.
        stop(DataDir.open(folder / "notebook" / "data"))
    return found


def pages(outputs: list[Any]) -> str:
    return "".join(output.data.get("text/html", "") for output in outputs if "data" in output)


def values(outputs: list[Any]) -> str:
    return "".join(output.data.get("text/plain", "") for output in outputs if "data" in output)


def test_no_notebook_is_left_out() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(ORDER)


def test_what_is_kept_of_a_notebook_is_its_text_alone() -> None:
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert [cell.outputs for cell in cells] == [[]] * len(cells)


def test_a_job_has_its_bars_its_curve_and_its_card(shown: dict[str, list[list[Any]]]) -> None:
    _, _, check, quote, submit, report, card, left = shown["adapt"]
    assert "True" in values(check)
    for working in (check, quote, submit, report):
        # One bar, which was moved to its end.
        assert pages(working).count("<progress") >= 1
    assert "100%" in values(quote)
    assert "1 of 1 cycle done" in values(submit)
    assert "<svg" in pages(report)
    assert "<h3>python-" in pages(card)
    assert "python-" in values(left)


def test_a_composition_has_its_card_and_its_parents(shown: dict[str, list[list[Any]]]) -> None:
    listed, made, card, verified, moved, again = shown["compose"]
    assert pages(listed).count("<tr>") == 3
    assert "<h3>" in pages(card)
    assert values(made).strip("'\n")
    assert "parent" in values(verified)
    assert float(values(moved)) > 0
    assert pages(again).count("<tr>") == 4


def test_base_and_experts_answer(shown: dict[str, list[list[Any]]]) -> None:
    _, models, answers, stream, stopped = shown["serve"]
    assert len(eval(values(models))) == 4
    assert values(answers).count("tiny+") == 3
    assert "".join(output.text for output in stream if "text" in output)
    assert values(stopped).strip() == "0"
