"""The command line as people and programs meet it. Verbs and options may be added; what is here stays."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import pkgutil
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.connito.cli.conftest import Call

VERBS = {
    "up": {"--cycles", "--miners", "--validators", "--adversaries", "--domain", "--base", "--data-dir", "--report",
           "--seed", "--no-wait", "--json"},
    "down": {"--data-dir", "--json"},
    "status": {"--watch", "--data-dir", "--json"},
    "doctor": {"--json"},
    "streams ensure": {"--json"},
    "streams ls": {"--json"},
    "dlq ls": {"--json"},
    "dlq show": {"--json"},
    "dlq retry": {"--json"},
    "replay": {"--json"},
    "base build": {"--from", "--branch", "--router-steps", "--moe-layers", "--experts", "--top-k", "--data", "--out", "--json"},
    "base import": {"--json"},
    "base show": {"--json"},
    "select": {"--base", "--data", "--routing-trace", "--general", "--method", "--threshold", "--max-experts",
               "--max-bytes", "--num-experts", "--json", "--statistics", "--save-statistics", "--earlier", "--contested",
               "--max-vram", "--scope", "--domain", "--helpers", "--diagnostics", "--effects", "--plots"},
    "explain": {"--from", "--no-model", "--json"},
    "audit": {"--from", "--no-model", "--against", "--json"},
    "ledger": {"--from", "--account", "--data-dir", "--json"},
    "payouts export": {"--key", "--from", "--data-dir", "--json"},
    "payouts verify": {"--by", "--json"},
    "payouts bind": {"--key", "--signature", "--out", "--json"},
    "payouts weights": {"--first", "--last", "--binding", "--metagraph", "--max-weight", "--min-allowed", "--from", "--json"},
    "advisories": {"--since", "--broker-log", "--json"},
    "backup": {"--data-dir", "--json"},
    "restore": {"--replicas", "--data-dir", "--json"},
    "ban": {"--why", "--run", "--lift", "--json"},
    "invite": {"--run", "--uses", "--expires", "--json"},
    "access export": {"--validators", "--miner", "--json"},
    "access add": {"--bus", "--json"},
    "access revoke": {"--bus", "--json"},
    "access rotate": {"--finish", "--bus", "--json"},
    "access list": {"--json"},
    "access enlist": {"--as", "--max-runs", "--bus", "--json"},
    "access dismiss": {"--bus", "--json"},
    "access acts": {"--json"},
    "job check": {"--json"},
    "job quote": {"--pilot", "--json"},
    "job report": {"--out", "--with-base", "--measure", "--json"},
    "library demand": {"--cycles", "--json"},
    "job submit": {"--json"},
    "job list": {"--json"},
    "job show": {"--json"},
    "job watch": {"--json"},
    "job cancel": {"--json"},
    "miner fits": {
        "--json", "--base", "--selection", "--sequences", "--length", "--bf16-parameters", "--memory-bytes", "--experts",
        "--micro-batch", "--residency", "--cuda", "--optimizer",
    },
    "miner init": {"--json"},
    "miner run": {"--key", "--label", "--invite", "--bus", "--roster", "--json"},
    "miner top": {"--key", "--json"},
    "console": {"--port", "--data-dir", "--json"},
    "miner status": {"--json"},
    "library list": {"--json"},
    "library show": {"--json"},
    "library search": {"--domain", "--like", "--base", "--json"},
    "library deposit": {"--json"},
    "library verify": {"--base", "--json"},
    "library compose": {"--base", "--out", "--method", "--weight", "--json"},
    "library remove": {"--base", "--out", "--json"},
    "library prune": {"--base", "--data", "--out", "--method", "--max-experts", "--max-bytes", "--json"},
    "library extract": {"--base", "--data", "--out", "--json"},
    "library export": {"--base", "--out", "--as", "--json"},
}  # fmt: skip


def connito(*arguments: str | int | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")}
    command = [sys.executable, "-m", "connito.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)


@functools.cache
def command_line() -> Any:
    """The tree of commands; making it takes a good part of a second."""
    from connito.cli.app import app
    from typer.main import get_command

    return get_command(app)


def options(verb: str) -> set[str]:
    command = command_line()
    for name in verb.split():
        command = command.commands[name]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_and_their_options_stay(verb: str) -> None:
    assert VERBS[verb] <= options(verb)


def every_verb() -> set[str]:
    def walk(command: object, path: tuple[str, ...]) -> set[str]:
        children = getattr(command, "commands", None)
        if children is None:
            return {" ".join(path)}
        return set().union(*(walk(child, (*path, name)) for name, child in children.items()))

    return walk(command_line(), ())


# What does in Python what a verb does, where it is not `connito.library.VERB` or `Client.job.VERB`.
COUNTERPARTS = {
    "evaluate": "connito.library.evaluate",
    "up": "connito.local.up.run_here",
    "down": "connito.local.up.stop",
    "doctor": "connito.local.doctor.doctor",
    "select": "connito.select",
    "audit": "connito.audit.runs.audit",
    "archive": "connito.audit.runs.archive",
    "clean": "connito.client.cleaning.clean",
    "backup": "connito.client.backups.backup",
    "restore": "connito.client.backups.recover",
    "explain": "connito.audit.runs.explain",
    "ban": "connito.Client.ban",
    "invite": "connito.wire.invites.issue",
    "status": "connito.client.runs.status",
    "replay": "connito.client.runs.replay",
    "ledger": "connito.client.runs.ledger",
    "advisories": "connito.client.security.advisories",
    "streams ensure": "connito.client.streams.ensure",
    "streams ls": "connito.client.streams.ls",
    "dlq ls": "connito.client.dead_letters.ls",
    "dlq show": "connito.client.dead_letters.show",
    "dlq retry": "connito.client.dead_letters.retry",
    "access export": "connito.platform.access.Access.export",
    "access add": "connito.platform.access.Access.add",
    "access revoke": "connito.platform.access.Access.revoke",
    "access rotate": "connito.platform.access.Access.rotate",
    "access list": "connito.platform.access.Access.members",
    "access enlist": "connito.platform.access.Access.enlist",
    "access dismiss": "connito.platform.access.Access.dismiss",
    "access lend": "connito.client.lending.boxes",
    "access acts": "connito.platform.acts.Acts.read",
    "base build": "connito.base.recipes.build_base",
    "base show": "connito.base.folders.show",
    "base import": "connito.base.folders.import_",
    "payouts export": "connito.client.payouts.export",
    "payouts verify": "connito.client.payouts.verify",
    "payouts bind": "connito.client.hotkeys.bind",
    "payouts weights": "connito.client.hotkeys.weights",
    "miner init": "connito.wire.identity.Identity.generate",
    "miner join": "connito.client.joining.join",
    "miner top": "connito.client.runs.top",
    "miner fits": "connito.workloads.rehearsal.rehearse",
    "miner status": "connito.client.runs.miner",
}
# These become a process that stays: of a service, for which `python -m services.NAME` is the same thing, or the witness.
PROCESSES = {"console", "miner run", "serve", "witness"}


def counterpart(verb: str) -> str:
    group, _, name = verb.partition(" ")
    if group == "library":
        return f"connito.library.{name}"
    return f"connito.client.jobs.Jobs.{name}" if group == "job" else COUNTERPARTS[verb]


def test_what_the_command_line_can_do_python_can_do() -> None:
    missing = {}
    for verb in every_verb() - PROCESSES:
        try:
            assert callable(pkgutil.resolve_name(counterpart(verb)))
        except (AttributeError, ImportError, KeyError) as error:
            missing[verb] = repr(error)
    assert missing == {}
    assert every_verb() >= COUNTERPARTS.keys() | PROCESSES


def test_the_reference_of_python_names_every_counterpart() -> None:
    page = (Path(__file__).parents[4] / "docs/reference/python.md").read_text()
    verbs = {verb: counterpart(verb) for verb in every_verb() - PROCESSES if not verb.startswith("job ")}
    assert {verb: path for verb, path in verbs.items() if path not in page} == {}


def test_the_arguments_in_the_reference_of_python_are_those_of_the_functions() -> None:
    page = (Path(__file__).parents[4] / "docs/reference/python.md").read_text()
    rows = re.findall(r"\| `(connito\.[\w.]+)\(([\w, ]*)\)`", page.partition("## The rest")[2])
    assert len(rows) > 25
    wrong = {}
    for path, arguments in rows:
        known = inspect.signature(pkgutil.resolve_name(path)).parameters
        required = {name for name, row in known.items() if row.default is row.empty and name != "self"}
        named = {name for name in arguments.split(", ") if name}
        if not required <= named <= known.keys():
            wrong[path] = str([*known])
    assert wrong == {}


def test_a_name_that_is_no_verb_of_the_library_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pkgutil.resolve_name("connito.library.nonsense")


def test_type_checkers_see_every_verb_of_the_library() -> None:
    import connito.library as library

    stub = ast.parse(Path(library.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    seen = {name.asname or name.name: f"{node.module}.{name.name}" for node in imports for name in node.names}
    assert seen.keys() == set(library.__all__)
    offered = {name: inspect.unwrap(getattr(library, name)) for name in seen}
    assert {name for name, path in seen.items() if pkgutil.resolve_name(path) is not offered[name]} == set()
    assert library.compose is library.compose


def test_every_verb_is_promised_and_prints_json() -> None:
    verbs = every_verb()
    assert set(VERBS) <= verbs
    assert [verb for verb in verbs if "--json" not in options(verb)] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_and_options(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The shell is named, not guessed from the processes above: CI has none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = connito("--show-completion", shell)
    assert shown.returncode == 0
    assert "connito" in shown.stdout

    def complete(line: str) -> str:
        asked = {
            "_CONNITO_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        asked |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        code = "import sys; sys.argv = ['connito']; from connito.cli import main; main()"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **asked}).stdout

    assert {"verify", "search"} <= set(re.findall(r"[a-z]+", complete("connito library ")))
    assert "--threshold" in complete("connito select --th")


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["connito", "--help"]
try:
    from connito.cli import main
    main()
finally:
    print(sorted(sys.modules))
"""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    seconds = sum(after[2:4]) - sum(before[2:4])  # of the processor, in children
    loaded = set(done.stdout.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert not loaded & {"torch", "transformers", "numpy", "nats", "grpc", "minio"}
    assert seconds < 3  # Half a second on an idle machine.


def test_a_wrong_option_is_a_usage_error() -> None:
    done = connito("up", "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
    assert connito().returncode == 2


def test_the_version_is_printed() -> None:
    from connito import __version__

    assert connito("--version").stdout == f"connito {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cycles", "0"), "--cycles is 0; choose 1 to 1000"),
        (("--adversaries", "copier,ghost"), "--adversaries names 'ghost'; known kinds: copier"),
        (("--base", "tiny", "--domain", "medical"), "--domain medical is not known for this base; choose recipes"),
        (("--base", "nowhere/at/all"), "--base nowhere/at/all is neither"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_before_anything_starts(
    arguments: tuple[str, ...], message: str, tmp_path: Path, call: Call
) -> None:
    done = call("up", *arguments, "--data-dir", tmp_path / "data")
    assert done.code == 3
    assert done.out == ""
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "verb",
    [
        "status",
        "streams ls",
        "dlq ls",
        "job list",
        "library list",
        "console",
        "replay some-run",
        "audit some-run",
        "ledger some-run",
        "payouts export some-run file.csv",
        "explain some-run/1/miner-1",
    ],
)
def test_without_a_platform_the_command_that_starts_one_is_named(verb: str, tmp_path: Path, call: Call) -> None:
    done = call(*verb.split(), "--json", "--data-dir", tmp_path)
    assert done.code == 4
    assert done.out == ""
    assert "start it with `connito up --no-wait" in done.err


def test_down_where_nothing_runs_is_no_error(tmp_path: Path) -> None:
    done = connito("down", "--json", "--data-dir", tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"data_dir": str(tmp_path), "stopped": None}


def test_doctor_prints_one_document_with_a_remedy_for_what_is_missing(tmp_path: Path) -> None:
    done = connito("doctor", "--json", "--data-dir", tmp_path)
    document = json.loads(done.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert {"python", "nats-server", "weed", "data directory disk", "memory", "local ports", "platform"} <= set(checks)
    assert done.returncode == (0 if document["ok"] else 5)
    assert all(check["ok"] or check["remedy"] for check in checks.values())


def test_whether_a_selection_fits_is_said_before_anything_is_loaded(
    tmp_path: Path, random_base: Path, call: Call
) -> None:
    (tmp_path / "config.json").write_text((random_base / "config.json").read_text())
    selection = tmp_path / "selection.json"
    selection.write_text(json.dumps({"layers": {"1": [1, 2]}, "helpers": {"1": [3]}}))
    asked = ("miner", "fits", "--base", tmp_path, "--selection", selection, "--json", "--memory-bytes")
    said = json.loads(call(*asked, 10**9).out)
    assert (said["fits"], said["residency"], said["settings"]) == (True, "all", {})
    muon = json.loads(call(*asked, 10**9, "--optimizer", "muon").out)
    assert muon["total"] < said["total"], "it keeps half of what AdamW keeps"
    tight = json.loads(call(*asked, said["total"] - 1).out)
    assert tight["fits"]
    assert tight["total"] < said["total"]
    assert list(tight["settings"]) == ["CONNITO_MICRO_BATCH=1"]
    refused = call(*asked, 1000)
    assert refused.code == 3
    assert "even with CONNITO_MICRO_BATCH=1 and" in refused.err
    selection.write_text("{}")
    assert "connito select --json" in call(*asked, 1000).err


def test_a_miner_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    key = tmp_path / "miner.nk"
    made = json.loads(connito("miner", "init", "--key", key, "--json").stdout)
    assert made["public_key"].startswith("U")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    seed = key.read_text()
    again = connito("miner", "init", "--key", key)
    assert again.returncode == 3
    assert "losing a key loses its rewards" in again.stderr
    assert key.read_text() == seed


def test_running_a_miner_without_a_broker_says_which_variable(tmp_path: Path) -> None:
    key = tmp_path / "miner.nk"
    connito("miner", "init", "--key", key)
    done = connito("miner", "run", "--key", key)
    assert done.returncode == 3
    assert "CONNITO_NATS_URL" in done.stderr
    assert connito("miner", "run", "--key", tmp_path / "none").returncode == 3


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("cycles: [1", 3, "YAML"),
        ("- a\n- b\n", 3, "no mapping"),
        ("domian: medical\n", 3, "domian"),
        (None, 4, "no file"),
    ],
)
def test_a_job_that_cannot_be_read_is_refused_with_the_place(
    text: str | None, code: int, message: str, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    done = call("job", "submit", path)
    assert done.code == code
    assert message in done.err


def test_a_job_file_fills_the_spec(tmp_path: Path) -> None:
    from connito.jobs.spec import read_run_spec

    path = tmp_path / "job.yaml"
    path.write_text("run: r1\ndomain: medical\ncycles: 2\ntraining:\n  local_steps: 5\n  learning_rate: 2e-4\n")
    spec = read_run_spec(path)
    assert (spec.run, spec.cycles, spec.training.local_steps) == ("r1", 2, 5)
    assert spec.training.learning_rate == pytest.approx(2e-4)


def trace(path: Path) -> Path:
    """Ten tokens, top-2 of 4: expert 2 takes every first slot, 0 and 3 share the second."""
    ids = np.array([[2, 0]] * 6 + [[2, 3]] * 4)
    weights = np.full((10, 2), 0.5)
    np.savez(path, layer_1_ids=ids, layer_1_weights=weights)
    return path


def test_select_from_a_trace_prints_the_published_layout(tmp_path: Path) -> None:
    done = connito(
        "select", "--routing-trace", trace(tmp_path / "t.npz"), "--threshold", "0.6", "--num-experts", "4", "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["method"] == "esft-token"
    assert document["threshold"] == 0.6
    assert document["layers"] == {"1": [2, 0]}
    assert document["scores"] == {"1": [0.3, 0.0, 0.5, 0.2]}
    assert (document["selected"], document["total"]) == (2, 4)
    assert document["mass"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 3, "either --base with --data, or --routing-trace"),
        (("--base", "."), 3, "--data"),
        (("--routing-trace", "none.npz"), 4, "none.npz"),
        (("--routing-trace", "t.npz", "--max-bytes", "5"), 3, "--max-bytes needs"),
        (("--routing-trace", "t.npz", "--method", "guess", "--num-experts", "4"), 3, "guess"),
    ],
)
def test_select_refuses_what_it_cannot_do(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace(tmp_path / "t.npz")
    monkeypatch.chdir(tmp_path)
    done = call("select", *arguments)
    assert done.code == code
    assert message in done.err
    assert "Traceback" not in done.err
