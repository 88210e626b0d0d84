"""Docstrings are plain English: functions begin with a verb, modules and classes never with a question."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "shared/connito/v1"
MODULES = [
    path
    for folder in ("shared/connito", "services", "bench", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if GENERATED not in path.parents
]
FIRST_WORD = re.compile(r"[A-Za-z-]+(?=[\s,:.]|$)")
# "Bytes …", "Returns …", "Number of …": plurals, the third person, and nouns with a genitive.
NOT_IMPERATIVE = re.compile(r"\w*[^\Ws]s\b|\w+ of\b")
QUESTIONS = {"what", "whether", "who", "whom", "whose", "where", "when", "which", "why", "how"}
RIDDLES = {f"{part}{end}" for part in ("every", "some", "any", "no") for end in ("thing", "one", "body")}
# Words that begin a noun phrase, where a function has to say what it does.
NOUN_PHRASES = {
    "a", "an", "the", "this", "that", "these", "those", "it", "its", "all", "any", "both", "each", "every", "no", "none",
    "one", "two", "three", "only", "same", "such", "as", "at", "by", "for", "from", "in", "inside", "into", "like", "of",
    "on", "to", "with", "without", "until", "while",
}  # fmt: skip
FunctionLike = ast.FunctionDef | ast.AsyncFunctionDef


def documented(tree: ast.AST, *, public: bool = True) -> Iterator[tuple[ast.AST, int, str]]:
    """Yield (definition, line of its docstring, docstring) of a module, its classes and their public functions."""
    for node in [tree, *ast.iter_child_nodes(tree)] if isinstance(tree, ast.Module) else ast.iter_child_nodes(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | FunctionLike):
            continue
        hidden = isinstance(node, FunctionLike) and node.name.startswith("_")
        text = ast.get_docstring(node)
        if text and not (public and hidden):
            yield node, node.body[0].lineno, text
        if isinstance(node, ast.ClassDef):
            yield from documented(node, public=public)


def unclear(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, first line) of each docstring that asks a question, riddles, or names a thing instead of an act."""
    for node, line, text in documented(ast.parse(source)):
        start = text.splitlines()[0]
        found = FIRST_WORD.match(start)
        word = found.group().lower() if found else ""
        if isinstance(node, FunctionLike):
            bad = not found or word in QUESTIONS | RIDDLES | NOUN_PHRASES or NOT_IMPERATIVE.match(start) is not None
        else:
            bad = word in QUESTIONS | RIDDLES
        if bad:
            yield line, start


def test_every_docstring_is_plain() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {start}" for path in MODULES for line, start in unclear(path.read_text())
    ]
    assert len(MODULES) > 200
    assert found == []


@pytest.mark.parametrize(
    "start",
    ["What a run came to.", "Whether it fits.", "Who may read.", "Everything that was found.", "The model's tensor.",
     "`θ` of the rows.", "[n, L] ids.", "(low, high) of a change.", "A run's facts.", "Bytes of a tensor.",
     "Returns it.", "Number of experts."],
)  # fmt: skip
def test_a_function_has_to_begin_with_a_verb(start: str) -> None:
    source = f'class Run:\n    def report(self) -> int:\n        """{start}"""\n'
    assert list(unclear(source)) == [(3, start)]


def test_a_private_function_may_be_described_by_a_noun_and_a_class_always() -> None:
    assert (
        list(unclear('"""Reports."""\nclass A:\n    """A report."""\n    def _f(self):\n        """A sum."""\n')) == []
    )


@pytest.mark.parametrize("kind", ["{}", "class A:\n    {}"])
def test_a_module_or_a_class_never_asks(kind: str) -> None:
    assert len(list(unclear(kind.format('"""How a run ends."""')))) == 1


# What people count in sentences; the wings whose sentences people read.
COUNTED = set(
    re.findall(
        r"\w+",
        """miners validators experts layers cycles versions messages objects files rows steps documents conversations items
        texts keys runs services artifacts tokens sequences branches entries copies passages streams units threads days""",
    )
)
SAYING = ("cli", "views", "local", "client", "jobs", "curation", "library", "audit")


def bare_counts(source: str) -> list[str]:
    """Return what sentences count by hand, so that one of it would read as several."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for number, text in pairwise(parts):
            if not isinstance(number, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            said = str(text.value)
            counts = isinstance(number.value, ast.Call) and ast.unparse(number.value.func) == "len"
            counts |= isinstance(number.value, ast.Attribute) and number.value.attr in COUNTED | {"count", "total"}
            words = [word.strip(".,;:)'") for word in said.split()]
            if counts and said.startswith(" ") and words and words[0] in COUNTED:
                found.append(f"{ast.unparse(number.value)} {words[0]}")
    return found


@pytest.mark.parametrize("wing", [*(f"shared/connito/{wing}" for wing in SAYING), "services"])
def test_one_of_something_is_not_said_in_the_plural(wing: str) -> None:
    bare = {str(p): seen for p in (ROOT / wing).rglob("*.py") if (seen := bare_counts(p.read_text(encoding="utf-8")))}
    assert not bare, "say it by connito.render.formats.count"


def test_a_count_by_hand_is_seen() -> None:
    assert bare_counts('f"{len(found)} miners, {row.total} experts, {what} miners"') == [
        "len(found) miners",
        "row.total experts",
    ]
