"""What a customer's folder holds in tests: real text, rows of it, and a task."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path
from types import ModuleType


def functions(*modules: ModuleType) -> list[str]:
    """Real text: the source of functions of the standard library."""
    return [
        textwrap.dedent(inspect.getsource(thing))
        for module in modules
        for _, thing in sorted(inspect.getmembers(module, inspect.isfunction))
        if thing.__module__ == module.__name__
    ]


def docstrings(*modules: ModuleType) -> list[str]:
    found = [
        ast.get_docstring(node) or ""
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    return [text for text in found if len(text) > 100]


def rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"name": text[:20], "body": text}) + "\n" for text in texts))


def quiz(folder: Path) -> None:
    """A task of lm-evaluation-harness: whether code goes on as code or as verse."""
    folder.mkdir()
    items = [
        {"given": f"def f{n}(self, value):\n    ", "good": f"return value + {n}", "bad": "ὦ σελήνη"} for n in range(12)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "task.yaml").write_text("""
task: goes_on
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{given}}"
doc_to_choice: "{{[bad, good]}}"
doc_to_target: 1
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""")
