"""The documentation as a reader gets it: a site whose every link and anchor holds, and pages that the index knows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    # Not --quiet: what is not logged is not counted, and strict would mean nothing.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    front = (tmp_path / "site/index.html").read_text()
    tabs = [found.split(">")[-1].strip() for found in re.findall(r"<a[^>]*md-tabs__link[^>]*>[^<]*", front)]
    assert tabs == ["Start", "Tutorials", "How to", "Explanation", "Reference", "Contributing"]
    listed = re.findall(r'<a href="([\w/.-]+\.html)" class="md-nav__link', front)
    linked = {(tmp_path / "site" / target).resolve() for target in listed}
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(str(page) for page in pages if (tmp_path / "site" / page).resolve() not in linked) == []
    assert not re.findall(r'(?:src="|<link [^>]*href=")(?:https?:)?//', front), (
        "the site fetches nothing from elsewhere"
    )


def test_a_broken_link_would_be_found(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# One\n\n[two](two.md) and [a part](index.md#no-such-part)\n")
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "two.md" in done.stderr
    assert "no-such-part" in done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page: str) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall((ROOT / page).read_text())]
    missing = [target for target in targets if target and "://" not in target and not (ROOT / target).exists()]
    assert missing == []


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/index.md"
    named = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(index.read_text())}
    folders = ("tutorial", "how-to", "contributing", "reference", "explanation", "adr")
    pages = {page.resolve() for folder in folders for page in (ROOT / "docs" / folder).glob("*.md")}
    assert sorted(str(page.relative_to(ROOT)) for page in pages - named) == []


def test_the_index_calls_each_decision_by_its_title() -> None:
    titles = {page.name: page.read_text().partition("\n")[0] for page in (ROOT / "docs/adr").glob("*.md")}
    called = re.findall(r"^- \[(.+)\]\(adr/([\w.-]+)\)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert {name: f"# {title}" for title, name in called} == titles
