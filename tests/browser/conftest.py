"""The console in a real browser, over a real run.

`axe`      the path of axe.min.js
`browser`  a headless Chromium for the whole session
`site`     a console over a platform whose run on the tiny base has ended
`bench`    a console over a broker of its own, to be fed, stalled and killed
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from connito.base.recipes import cached_base
from connito.bus import Bus
from connito.platform.servers import NatsServer
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.browser.chromium import Chromium
from tests.e2e.conftest import environment
from tests.integration.witness import ServiceProcess
from tests.support.waiting import declared, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def axe() -> Path:
    done = subprocess.run([ROOT / "scripts/install-browser"], check=False, capture_output=True, text=True)
    if done.returncode == 75:
        pytest.skip(f"NO BROWSER: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def browser(axe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@dataclass(frozen=True)
class Site:
    """A console, and the run that it shows."""

    address: str
    data: Path
    run: str
    expert: str
    miners: dict[str, str]

    def pages(self) -> dict[str, str]:
        """Every kind of page by a name."""
        run = f"/runs/{self.run}"
        return {
            "runs": "/",
            "run": run,
            "cycle": f"{run}?cycle=1",
            "replay": f"{run}?at=40",
            "selection": f"{run}/selection",
            "lineage": f"{run}/lineage",
            "why-merged": f"{run}/why/2/{self.miners['miner-1']}",
            "why-refused": f"{run}/why/1/{self.miners['nan-1']}",
            "library": "/library",
            "nothing-found": "/library?q=nothing-like-it",
            "expert": f"/library/{self.expert}",
            "comparison": f"/library/compare?id={self.expert}",
            "demand": "/library/demand",
            "example": "/library/example",
            "dead-letters": "/dead-letters",
            "bus": "/bus",
            "problem": "/runs/no-such-run",
        }


def connito(*arguments: str, data: Path) -> Any:
    command = [sys.executable, "-m", "connito.cli", *arguments, "--json", "--data-dir", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=200)
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def until_read(address: str, run: str) -> None:
    """Wait until the console answers and knows the run."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def shown() -> bool:
        with opener.open(address, timeout=5) as answer:
            return run in answer.read().decode()

    wait_until(shown, f"{address} to show {run}")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data = tmp_path_factory.mktemp("site") / "data"
    up = ("--base", "tiny", "--cycles", "2", "--miners", "2", "--validators", "2", "--adversaries", "copier,nan")
    started = connito("up", *up, "--set", "training.local_steps=16", "--no-wait", data=data)
    try:
        connito("job", "watch", started["run"], data=data)
        base = cached_base("tiny") / "model"
        with (
            serving("serve", "--base", str(base), data=data) as served,
            serving("console", data=data, CONNITO_CONSOLE_SERVE_URL=served) as address,
        ):
            keys = {
                path.stem: Identity.load(path).public
                for path in (data / "keys").glob("*.nk")
                if path.stem in ("miner-1", "nan-1", "copier-1")
            }
            until_read(address.rstrip("/"), started["run"])
            expert = connito("library", "list", data=data)["experts"][0]["expert_id"]
            yield Site(address.rstrip("/"), data, started["run"], expert, keys)
    finally:
        connito("down", data=data)


@contextmanager
def serving(verb: str, *options: str, data: Path, **variables: str) -> Iterator[str]:
    """A command that prints its address and stays, until the block is left."""
    command = [sys.executable, "-m", "connito.cli", verb, *options, "--port", "0", "--json", "--data-dir", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment() | variables) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while not lines or lines[-1] != "}\n":
                lines.append(process.stdout.readline())
                assert lines[-1], f"{verb} ended"
            yield json.loads("".join(lines))["address"]
        finally:
            process.terminate()


@dataclass
class Bench:
    """A broker, somebody who may write facts, and a console over it."""

    nats: NatsServer
    bus: Bus
    console: ServiceProcess

    def wait_until_it_listens(self) -> None:
        """Until then there is no `address`."""
        self.console.wait_for_log('"kind": "console"')

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.console.ports['console']}"


@pytest.fixture
async def bench(tmp_path: Path, identities: dict[str, Identity], roster: Roster) -> AsyncIterator[Bench]:
    with NatsServer(tmp_path / "nats") as nats:
        async with await Bus.connect(nats.url, identities["coordinator"], "test", roster) as bus:
            await declared(bus.js)
            console = ServiceProcess(
                "console", tmp_path / "console", identities["customer"], roster, {"CONNITO_NATS_URL": nats.url}
            ).start()
            try:
                console.wait_for_log('"event": "ready"')
                yield Bench(nats, bus, console)
            finally:
                console.kill()
