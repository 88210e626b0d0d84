"""A folder of a customer: a base of random weights with a byte tokenizer, and real text to bring."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def customer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, `code.jsonl`, `prose.jsonl`: functions and docstrings of the standard library."""
    import argparse
    import ast
    import decimal
    import pathlib
    import shutil
    import statistics
    import tarfile

    from tests.support.models import save_random

    folder = tmp_path_factory.mktemp("customer")
    save_random(
        folder / "base", hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_experts=4, shared_expert_intermediate_size=8, mlp_only_layers=[],
    )  # fmt: skip
    modules = (argparse, ast, shutil, statistics, tarfile)
    code = [
        textwrap.dedent(inspect.getsource(thing))
        for module in modules
        for _, thing in inspect.getmembers(module, inspect.isfunction)
        if thing.__module__ == module.__name__
    ]
    prose = [
        ast.get_docstring(node) or ""
        for module in (*modules, decimal, pathlib)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    write(folder / "code.jsonl", code)
    write(folder / "prose.jsonl", [text for text in prose if len(text) > 100])
    return folder


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
