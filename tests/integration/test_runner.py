"""A service process as its supervisor sees it: probes, drain, exit codes, a broker that comes late."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from connito.platform.servers import NatsServer, free_ports
from connito.wire.identity import Identity

from tests.support.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.integration

SERVICE = """
import asyncio, sys
from pydantic import Field
from connito.errors import Fatal
from connito.service.runner import run_service
from connito.runtime.settings import ServiceSettings

class Settings(ServiceSettings):
    mode: str = Field("wait", description="what the service does")

async def main(ctx):
    ctx.ready()
    if ctx.settings.mode == "fail":
        raise Fatal("the lease is lost")
    if ctx.settings.mode == "bug":
        raise ZeroDivisionError
    if ctx.settings.mode == "hang":
        await asyncio.Event().wait()
    await ctx.stop.wait()
    await asyncio.sleep(0.2)
    ctx.log.info("finished what was begun")

run_service("sample", main, Settings)
"""


class Service:
    def __init__(self, folder: Path, nats_url: str, **settings: str) -> None:
        self.port_file = folder / "ports.json"
        key = folder / "key"
        Identity.generate().save(key)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")} | {
            "CONNITO_NATS_URL": nats_url,
            "CONNITO_KEY_FILE": str(key),
            "CONNITO_PORT_FILE": str(self.port_file),
            **settings,
        }
        (folder / "service.py").write_text(SERVICE)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "service.py")], env=environment, stderr=subprocess.PIPE, text=True
        )

    def get(self, path: str) -> tuple[int, str]:
        wait_until(self.port_file.exists)
        connection = http.client.HTTPConnection("127.0.0.1", json.loads(self.port_file.read_text())["http"], timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def end(self, number: int | None = None) -> tuple[int, str]:
        if number is not None:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


@pytest.fixture
def start(tmp_path: Path, nats_server: NatsServer) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def run(nats_url: str = "", **settings: str) -> Service:
        services.append(Service(tmp_path, nats_url or nats_server.url, **settings))
        return services[-1]

    yield run
    for service in services:
        if service.process.poll() is None:
            service.process.kill()
            service.process.communicate()
        elif service.process.stderr is not None:
            service.process.stderr.close()


def test_probes_metrics_and_a_drained_end(start: Any) -> None:
    service = start()
    wait_until(lambda: service.get("/readyz")[0] == 200)
    assert service.get("/healthz") == (200, "alive\n")
    status, text = service.get("/metrics")
    assert status == 200
    assert "connito_bus_connected 1.0" in text
    assert service.get("/elsewhere")[0] == 404
    code, said = service.end(signal.SIGTERM)
    assert code == 0
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["event"] for line in lines][-3:] == ["draining", "finished what was begun", "stopped"]
    assert all(line["service"] == "sample" for line in lines)


def test_a_main_that_ignores_the_drain_is_cancelled(start: Any) -> None:
    service = start(CONNITO_MODE="hang", CONNITO_DRAIN_SECONDS="0.3")
    wait_until(lambda: service.get("/readyz")[0] == 200)
    began = time.monotonic()
    assert service.end(signal.SIGTERM)[0] == 0
    assert time.monotonic() - began < 10  # what it would wait without the setting


def test_not_ready_but_alive_until_the_broker_comes(start: Any, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    service = start(f"nats://127.0.0.1:{port}")
    assert service.get("/readyz") == (503, "not ready: no broker\n")
    assert service.get("/healthz")[0] == 200
    with NatsServer(tmp_path / "late", port=port) as server:
        wait_until(lambda: service.get("/readyz")[0] == 200)
        server.kill()
        wait_until(lambda: service.get("/readyz")[0] == 503)
        assert service.get("/healthz")[0] == 200
        server.start()
        wait_until(lambda: service.get("/readyz")[0] == 200)
        code, said = service.end(signal.SIGTERM)
    assert code == 0
    assert "waiting for the broker" in said


def test_stopped_while_it_waits_for_the_broker(start: Any) -> None:
    service = start("nats://127.0.0.1:1")
    assert service.get("/healthz")[0] == 200
    assert service.end(signal.SIGTERM)[0] == 0


def test_fatal_is_one_clear_line_and_a_code(start: Any) -> None:
    code, said = start(CONNITO_MODE="fail").end()
    assert code == 1
    assert said.splitlines()[-1] == "sample: the lease is lost"


def test_a_bug_ends_the_process(start: Any) -> None:
    code, said = start(CONNITO_MODE="bug").end()
    assert code == 1
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("CONNITO_HTTP_PORT", "many", "CONNITO_HTTP_PORT"),
        ("CONNITO_LOG_LEVEL", "loud", "CONNITO_LOG_LEVEL"),
        ("CONNITO_KEY_FILE", "/nowhere/key", "/nowhere/key"),
        ("CONNITO_ROSTER", "/nowhere/roster", "/nowhere/roster"),
    ],
)
def test_a_bad_setting_is_named(start: Any, setting: Any, value: Any, message: Any) -> None:
    code, said = start(**{setting: value}).end()
    assert code in (1, 3)
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_taken_port_is_named(start: Any, nats_server: NatsServer) -> None:
    code, said = start(CONNITO_HTTP_PORT=str(nats_server.port)).end()
    assert code == 1
    assert str(nats_server.port) in said
    assert "CONNITO_HTTP_PORT" in said


def test_help_lists_every_variable(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(SERVICE)
    done = subprocess.run(
        [sys.executable, tmp_path / "service.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "CONNITO_MODE" in done.stdout
    assert "what the service does [wait]" in done.stdout
    assert "CONNITO_KEY_FILE" in done.stdout
    assert "required" in done.stdout


def test_a_control_plane_process_is_small_and_starts_quickly(start: Any) -> None:
    service = start()
    wait_until(lambda: service.get("/readyz")[0] == 200)
    cpu = psutil.Process(service.process.pid).cpu_times()
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    (resident,) = (int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident < 120
    assert cpu.user + cpu.system < 5
    assert service.end(signal.SIGTERM)[0] == 0
