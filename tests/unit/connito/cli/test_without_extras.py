"""Where no extra is installed, every command and every name of the Python surface works or is one sentence that names one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from connito.runtime.extras import EXTRA

from tests.support.hiding import HIDING

ROOT = Path(__file__).parents[4]

# Calls every command with a word for whatever it demands, and every name that is offered; prints what came of each.
SWEEP = (
    HIDING
    + """
import contextlib, io, json, pathlib, traceback

import typer
import connito, connito.library
from connito.cli.app import app
from connito.runtime.exits import explained

def demanded(command):
    for param in command.params:
        if param.required:
            yield from ["1"] if param.param_type_name == "argument" else [param.opts[0], "1"]

def commands(command, path=()):
    inside = getattr(command, "commands", None)
    if inside is None:
        yield path, [*demanded(command)]
    for name, one in (inside or {}).items():
        yield from commands(one, (*path, name))

found = {}
def tried(name, act):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            act()
        code = 0
    except SystemExit as error:
        code = error.code
    except connito.errors.ConnitoError as error:
        code = str(error)
    except BaseException:
        code = traceback.format_exc()[-600:]
    found[name] = [code, out.getvalue()[-600:]]

group = typer.main.get_command(app)
def call(words):
    with explained():
        group.main(words, "connito")

import connito.errors
for path, words in commands(group):
    tried(" ".join(path), lambda: call([*path, *words]))
# `serve` looks at the folder first.
base = pathlib.Path("base")
base.mkdir()
(base / "config.json").write_text("{}")
(base / "model.safetensors").write_bytes(bytes(8))
tried("serve", lambda: call(["serve", "--base", str(base)]))
for name in connito._WHERE:
    tried(f"connito.{name}", lambda: getattr(connito, name))
for name in connito.library._HOMES:
    tried(f"connito.library.{name}", lambda: getattr(connito.library, name))
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("bare")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")}
    environment = {
        **kept, "PYTHONPATH": os.pathsep.join([str(ROOT / "shared"), str(ROOT)]), "HIDDEN": " ".join(EXTRA),
        "HOME": str(place), "XDG_CACHE_HOME": str(place / "cache"), "CONNITO_DATA_DIR": str(place / "none"),
        "COLUMNS": "200",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SWEEP], cwd=place, env=environment, capture_output=True, text=True, check=False,
        timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_command_ends_with_a_sentence(swept: dict[str, Any]) -> None:
    ran = {name: said for name, said in swept.items() if not name.startswith("connito.")}
    assert len(ran) > 70
    assert {name: said for name, said in ran.items() if not isinstance(said[0], int)} == {}
    assert {name: said for name, said in ran.items() if "Traceback" in said[1]} == {}
    named = {name for name, (_, said) in ran.items() if "pip install 'connito[" in said}
    assert {"up", "serve", "library compose", "library grow"} <= named


def test_every_name_is_there_or_names_its_extra(swept: dict[str, Any]) -> None:
    names = {name: code for name, (code, _) in swept.items() if name.startswith("connito.")}
    odd = {name: code for name, code in names.items() if code != 0 and "pip install 'connito[" not in str(code)}
    assert odd == {}
    assert "connito[model]" in names["connito.library.compose"]
    assert names["connito.Client"] == names["connito.library.list"] == 0
