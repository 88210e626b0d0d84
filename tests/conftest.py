"""Fixtures for every test.

`identities`  one key per role of the roster, and `miner`
`roster`      the roster in which these keys have their roles
`run_id`      a run id that no other test uses
"""

from __future__ import annotations

import gc
import secrets
import sys
from collections.abc import Generator

import pytest
from connito.wire.identity import Identity
from connito.wire.roster import ROLES, Roster
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing is garbage while modules are imported: looking for it is a quarter of what importing them costs.

    And what was imported stays, so no later search walks over it; pytest makes several at its end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def nothing_waits() -> None:
    """What an earlier test in this process left waiting is no matter of the next one."""
    if (waiting := sys.modules.get("connito.runtime.waiting")) is not None:
        for entry in waiting.WAITING.entries():
            waiting.WAITING.end(entry.what)


@pytest.fixture(scope="session")
def keys() -> dict[str, Identity]:
    return {role: Identity.generate() for role in (*ROLES, "miner")}


@pytest.fixture
def identities(keys: dict[str, Identity]) -> dict[str, Identity]:
    """A key a role; a test that guards its broker gives them passes."""
    return dict(keys)


@pytest.fixture(scope="session")
def roster(keys: dict[str, Identity]) -> Roster:
    return Roster({role: frozenset({keys[role].public}) for role in ROLES})


@pytest.fixture
def run_id() -> str:
    return f"run-{secrets.token_hex(6)}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how to run the tests in this order again; `-p no:randomly` runs them in the order of the files."""
    if seed := terminalreporter.config.getoption("randomly_seed", None):
        terminalreporter.write_line(f"in the order of --randomly-seed={seed}")
