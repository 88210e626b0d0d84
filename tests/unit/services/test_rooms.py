"""Every service has the same rooms, and a room means the same in each (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[3] / "services"
NAMES = sorted(path.parent.name for path in SERVICES.glob("*/__main__.py"))

ROOMS = {"__init__", "__main__", "settings", "handlers", "state", "actions", "adapters", "api", "metrics"}
# What a service has beside them: its own concepts, each a pure piece of deciding or a piece of performing.
PURE = {
    "coordinator": {"deadlines", "enrolment", "expected"},
    "committer": {"judging", "said", "settlement"},
}
PERFORMING = {
    "coordinator": {"admission", "reading"},
    "committer": {"content", "downloads"},
    "library": {"joining"},
    "validator": {"memory"},
    "trainer": {"adversary", "base", "evaluation", "feedback", "own", "strategy", "training"},
    # A web page: it decides nothing and writes nothing.
    "console": {
        "access", "artifacts", "cards", "charts", "experts", "figures", "heatmap", "history", "lineage", "login", "pages",
        "readers", "shown", "sign_in", "trial", "tries", "views", "waterfall", "why",
    },
}  # fmt: skip
# Who decides elsewhere: auditors share the library's plan of a deposit.
WITHOUT_HANDLERS = {"console", "library"}
WITHOUT_ACTIONS = {"console"}
WITH_MODEL = {"aggregator", "selector", "trainer", "validator"}

PURE_MODULES = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "statistics", "typing"}
PURE_WINGS = {"render", "errors", "library", "protocol", "v1", "views", "wire"}


def tree(service: str, room: str) -> ast.Module:
    return ast.parse((SERVICES / service / f"{room}.py").read_text())


def imports(service: str, room: str) -> set[str]:
    """Dotted names of what a room imports anywhere; its neighbours as `.room`."""
    found: set[str] = set()
    for node in ast.walk(tree(service, room)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level and node.module is None:
            found |= {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {f"{'.' * node.level}{node.module}"} if node.level else {f"{node.module}.{a.name}" for a in node.names}
            )
    return found


def rooms(service: str) -> set[str]:
    return {path.stem for path in (SERVICES / service).glob("*.py")}


def neighbours(service: str, room: str) -> set[str]:
    return {name.removeprefix(".") for name in imports(service, room) if name.startswith(".")}


def functions(service: str, room: str) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree(service, room).body if isinstance(node, kinds)}


def bases(service: str, room: str) -> set[str]:
    classes = [node for node in ast.walk(tree(service, room)) if isinstance(node, ast.ClassDef)]
    return {ast.unparse(base).rpartition(".")[2] for node in classes for base in node.bases}


def is_pure(name: str) -> bool:
    top, _, rest = name.partition(".")
    wing, _, module = rest.partition(".")
    if top == "connito":
        # `Action` and `Decision` are what handlers answer with; `Chosen` is what a selection came to.
        return wing in PURE_WINGS or module in ("engine.Action", "engine.Decision", "selecting.Chosen")
    return top in PURE_MODULES or name == "google.protobuf.message.Message"


def test_all_eight_are_looked_at() -> None:
    assert NAMES == [
        "aggregator", "committer", "console", "coordinator", "library", "selector", "trainer", "validator",
    ]  # fmt: skip


@pytest.mark.parametrize("service", NAMES)
def test_the_rooms_of_a_service(service: str) -> None:
    own = PURE.get(service, set()) | PERFORMING.get(service, set())
    needed = {"__init__", "__main__", "settings"}
    needed |= set() if service in WITHOUT_HANDLERS else {"handlers"}
    needed |= set() if service in WITHOUT_ACTIONS else {"actions"}
    assert needed <= rooms(service)
    assert rooms(service) - ROOMS == own


@pytest.mark.parametrize("service", NAMES)
def test_main_is_the_composition_root_and_alone_runs_the_service(service: str) -> None:
    assert {"connito.service.lifecycle.Lifecycle", "connito.service.runner.run_service"} <= imports(service, "__main__")
    assert len((SERVICES / service / "__main__.py").read_text().splitlines()) <= 80
    for room in rooms(service) - {"__main__"}:
        assert not {"__main__", "actions"} & neighbours(service, room), room
        assert not [
            n for n in imports(service, room) if n.startswith(("connito.service.runner", "connito.service.life"))
        ]


@pytest.mark.parametrize("service", NAMES)
def test_settings_are_one_class_that_knows_no_other_room(service: str) -> None:
    base = "ModelSettings" if service in WITH_MODEL else "ServiceSettings"
    assert bases(service, "settings") == {base}
    assert neighbours(service, "settings") == set()


@pytest.mark.parametrize("service", sorted(set(NAMES) - WITHOUT_HANDLERS))
def test_handlers_decide(service: str) -> None:
    assert "decide" in functions(service, "handlers")
    assert "decide" not in functions(service, "actions")


@pytest.mark.parametrize("service", NAMES)
def test_what_decides_is_pure(service: str) -> None:
    pure = ({"handlers"} & rooms(service)) | PURE.get(service, set())
    for room in pure:
        impure = [name for name in imports(service, room) if not name.startswith(".") and not is_pure(name)]
        assert impure == [], room
        assert neighbours(service, room) <= pure | {"state", "strategy"}, room


@pytest.mark.parametrize("service", NAMES)
def test_apis_stand_in_api_and_calls_of_others_in_adapters(service: str) -> None:
    for room in rooms(service):
        assert (room == "api") == any(base.endswith("Servicer") for base in bases(service, room)), room
        if any(name.split(".")[0] == "grpc" for name in imports(service, room)):
            assert room == "adapters"


def test_a_room_for_metrics_declares_some() -> None:
    """The catalogue is `connito.runtime.metrics`; a room that only hands it on is one too many."""
    shells = [
        service
        for service in NAMES
        if "metrics" in rooms(service)
        and not any(name.startswith("prometheus_client") for name in imports(service, "metrics"))
    ]
    assert shells == []
