"""Limits of size, and no product code that only tests call (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULE_LINES, FUNCTION_LINES = 400, 60
REASON = "# Long: "
# Defined for others than the product: whoever has it must not find it gone.
FOR_OTHERS = {
    "connito.protocol.scoring.payout.register": "what an installed payout calls to make itself known",
}
Modules = Mapping[str, tuple[str, ast.Module]]


def parsed(*folders: str) -> dict[str, tuple[str, ast.Module]]:
    """Text and tree of every module that somebody wrote, by dotted name."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "v1" not in path.parts:
                parts = path.relative_to(ROOT / "shared" if folder.startswith("shared") else ROOT).with_suffix("").parts
                text = path.read_text()
                found[".".join(parts)] = text, ast.parse(text)
    return found


PRODUCT = parsed("shared/connito", "services")
EVERYTHING = PRODUCT | parsed("bench")


def too_long(modules: Modules) -> list[str]:
    """Modules and functions over the limits; a comment above the function or its decorators may give the reason."""
    found = []
    for name, (text, tree) in modules.items():
        lines = text.splitlines()
        found += [f"{name}: {len(lines)} lines"] if len(lines) > MODULE_LINES else []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
                reason = lines[first - 2].strip() if first > 1 else ""
                if size > FUNCTION_LINES and not (reason.startswith(REASON) and len(reason) > len(REASON) + 10):
                    found.append(f"{name}.{node.name}: {size} lines")
    return found


def imported(modules: Modules) -> set[str]:
    """Dotted names that a module imports, or reaches through a module that it imports."""
    found = set()
    for name, (_, tree) in modules.items():
        known: dict[str, str] = {}
        package = name.removesuffix(".__init__").split(".")
        if not name.endswith(".__init__"):
            package = package[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*start, *([node.module] if node.module else [])])
                known |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        found |= set(known.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                head, _, rest = ast.unparse(node.value).partition(".")
                if head in known:
                    found.add(".".join([known[head], *([rest] if rest else []), node.attr]))
    return found


def named_in_text(modules: Modules) -> set[str]:
    """Words of string constants that may name something: lazy tables, templates of pages."""
    constants = (
        node.value
        for _, tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value
    )
    pages = (path.read_text() for path in (ROOT / "services").rglob("*.html"))
    return {word for text in (*constants, *pages) for word in re.findall(r"\w+", text)}


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Names at the top of a module, without those that a decorator hands on."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not any(
                "command" in ast.unparse(part) or "callback" in ast.unparse(part) for part in node.decorator_list
            ):
                yield node.name, node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def unused(product: Modules, everything: Modules) -> list[str]:
    """What no module of the product or the benchmarks refers to."""
    used, words, found = imported(everything), named_in_text(product), []
    for name, (_, tree) in product.items():
        loads = [
            (
                part,
                {node.id for node in ast.walk(part) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)},
            )
            for part in tree.body
        ]
        module = name.removesuffix(".__init__")
        for own, node in definitions(tree):
            inside = any(own in names for part, names in loads if part is not node)
            if not inside and not own.startswith("__") and f"{module}.{own}" not in used and own not in words:
                found.append(f"{module}.{own}")
    return found


def test_modules_and_functions_keep_their_size() -> None:
    assert too_long(EVERYTHING) == []


def test_nothing_is_there_for_tests_alone() -> None:
    assert set(unused(PRODUCT, EVERYTHING)) == FOR_OTHERS.keys()


@pytest.mark.parametrize(
    ("above", "count"), [("", 1), ("# Long: one table, read from top to bottom\n", 0), ("# Long: \n", 1)]
)
def test_a_long_function_would_be_found(above: str, count: int) -> None:
    text = f"{above}def f():\n" + "    pass\n" * FUNCTION_LINES
    assert len(too_long({"a.b": (text, ast.parse(text))})) == count


def test_a_function_without_a_caller_would_be_found() -> None:
    texts = {
        "a.b": "def f(): return g()\ndef g(): return g()\ndef h(): return h()\n",
        "a.c": "from .b import f\nprint(f)\n",
    }
    assert unused({name: (text, ast.parse(text)) for name, text in texts.items()}, {}) == ["a.b.f", "a.b.h"]
    everything = {name: (text, ast.parse(text)) for name, text in texts.items()}
    assert unused(everything, everything) == ["a.b.h"]
