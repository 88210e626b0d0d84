"""`connito console`: the web page over the platform of this folder, or over the one that the environment names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from connito.cli.output import DataDirOption, emit

if TYPE_CHECKING:
    from connito.platform.datadir import DataDir, Platform

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document with the page's address, then serve in silence.")
]


def console(
    port: Annotated[int, typer.Option(min=0, max=65535, help="The page's port; 0 takes a free one.")] = 8088,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> NoReturn:
    """Show every run on a web page on 127.0.0.1, until interrupted. Reads only; other settings: CONNITO_… variables."""
    from connito.errors import Invalid
    from connito.platform.servers import free_ports
    from connito.platform.session import Session
    from connito.runtime.programs import service_module

    session = Session.open(data_dir, role="customer", wake=True)
    environment = dict(os.environ)
    if session.data is not None and session.platform is not None:
        environment |= _local(session.data, session.platform)
    host = environment.setdefault("CONNITO_CONSOLE_HOST", "127.0.0.1")
    if port == 0:
        port = free_ports(1)[0]
    environment["CONNITO_CONSOLE_PORT"] = str(port)
    # Where `connito serve` listens unless told otherwise.
    environment.setdefault("CONNITO_CONSOLE_SERVE_URL", "http://127.0.0.1:8000/v1")
    environment.setdefault("CONNITO_LOG_FORMAT", "console")
    environment.setdefault("CONNITO_LOG_LEVEL", "warning")
    _check_free(host, port, Invalid)
    address = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    emit(as_json, {"address": address, "bus": session.nats_url}, lambda: f"{address}  (stop it with Ctrl-C)")
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", service_module("console")]
    if session.resting:
        # This process stays: the broker and the store end with it.
        _serve(command, environment)
    os.execve(sys.executable, command, environment)  # noqa: S606 - no shell


def _serve(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Run the service as a child until it ends; a signal to this process ends it in order."""
    import signal
    import subprocess

    with subprocess.Popen(command, env=environment) as service:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: service.terminate())
        raise SystemExit(service.wait())


def _local(data: DataDir, platform: Platform) -> dict[str, str]:
    """Return the environment with which the service reads the platform that `connito up` runs."""
    return {
        "CONNITO_NATS_URL": platform.nats_url,
        "CONNITO_KEY_FILE": str(data.keys / "customer.nk"),
        "CONNITO_ROSTER": str(data.roster),
        "CONNITO_S3_ENDPOINT": platform.s3_endpoint,
        "CONNITO_S3_ACCESS_KEY": platform.s3_access_key,
        "CONNITO_S3_SECRET_KEY": platform.s3_secret_key,
        "CONNITO_CACHE_DIR": str(Path(data.cache)),
    }


def _check_free(host: str, port: int, refuse: type[Exception]) -> None:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise refuse(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or 0 for a free one"
        ) from error
