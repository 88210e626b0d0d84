"""The real broker and the real store on one machine: `nats-server` and SeaweedFS, as their wheels ship them.

Both are plain objects that block, so that tests, benchmarks and the command line can own them; from a coroutine, call
them through `asyncio.to_thread`.
"""

from __future__ import annotations

import atexit
import io
import json
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from connito.errors import Fatal, Invalid, Retry
from connito.files import write_durably
from connito.platform import durable_objects, store_guard
from connito.platform.accounts import JETSTREAM, SERVER, Accounts
from connito.platform.spawning import last_lines, spawn
from connito.runtime.progress import Notify

START_SECONDS = 60.0
PICKS = 5
EPHEMERAL = 32_768  # where Linux begins to give ports to connections; others begin higher


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on at this moment, from below those that the kernel gives to connections: one
    of these could be taken before its server listens.
    """
    candidates = random.SystemRandom().sample(range(10_240, EPHEMERAL), 1000)
    with ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            one = held.enter_context(socket.socket())
            with suppress(OSError):
                one.bind(("127.0.0.1", candidates.pop()))
                found.append(one.getsockname()[1])
        return found


def find_program(name: str) -> str:
    """Return the program beside this interpreter, or on PATH. Raises `Fatal` saying what to install."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Fatal(f"{name} is not installed; `pip install 'connito[demo]'` brings it")
    return found


class Server:
    """A child process with a log file; a subclass says how to start it and when it is ready."""

    program = ""

    def __init__(self, data_dir: Path, log_file: Path | None = None, *, die_with_parent: bool = True) -> None:
        self.data_dir = data_dir
        self.log_file = log_file if log_file is not None else data_dir / f"{self.program}.log"
        self.die_with_parent = die_with_parent
        self.process: subprocess.Popen[bytes] | None = None
        # How often other ports may still be picked: none once somebody knows the server by the ones it has.
        self._picks, self._log_before = PICKS, 0

    @property
    def pid(self) -> int:
        """Return the process id of the running server."""
        assert self.process is not None, "the server was not started"
        return self.process.pid

    @property
    def running(self) -> bool:
        """Return whether the process is there."""
        return self.process is not None and self.process.poll() is None

    async def stuck(self) -> str:
        """Return what only another start ends, though it runs; or the empty string."""
        return ""

    def start(self, progress: Notify | None = None) -> Self:
        """Start, and return once it really serves. Raises `Invalid` with the last lines of its log when it ends
        instead, `Retry` when it is not ready within a minute. Ports that another took meanwhile are picked again."""
        assert not self.running, "the server is running already"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                self.check_ports()
                self._begin(progress)
            except Invalid:
                if not self._picks or not self._met_another():
                    raise
                self._picks -= 1
                self._pick()
            else:
                self._picks = 0
                return self

    def _begin(self, progress: Notify | None) -> None:
        command = self._prepare()
        if progress is not None:
            progress(f"starting {self.program}")
        with self.log_file.open("ab") as log:
            self._log_before = log.tell()
            self.process = spawn(command, log.fileno(), self.data_dir, self.die_with_parent)
        atexit.register(self.kill)
        self._wait_ready(progress)

    def _met_another(self) -> bool:
        """Return whether another program has, or had, a port of this server, which does not run."""
        try:
            self.check_ports()
        except Invalid:
            return True
        said = self.log_file.read_bytes()[self._log_before :] if self.log_file.exists() else b""
        return re.search(rb"address already in use|handshake", said) is not None

    def stop(self, grace: float = 2.0) -> None:
        """Ask it to end; kill it after `grace` seconds. What it acknowledged is on disk either way."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reap()

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        self._reap()

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _reap(self) -> None:
        atexit.unregister(self.kill)
        if self.process is not None:
            self.process.wait()
        self._clean_up()

    def _wait_ready(self, progress: Notify | None) -> None:
        began, told = time.monotonic(), 0.0
        problem = ""
        while time.monotonic() - began < START_SECONDS:
            assert self.process is not None
            if self.process.poll() is not None:
                code = self.process.returncode
                self._reap()
                raise Invalid(
                    f"{self.program} ended with code {code} while starting; its log ends with:\n{last_lines(self.log_file)}\n"
                    f"  If its files are damaged, restore {self.data_dir} from a copy."
                )
            problem = self._not_ready()
            if not problem:
                return
            if progress is not None and time.monotonic() - told > 1.0:
                told = time.monotonic()
                progress(f"waiting for {self.program}: {problem}")
            time.sleep(0.03)
        self.kill()
        raise Retry(f"{self.program} is not ready after {START_SECONDS:.0f} s: {problem}; see {self.log_file}")

    def check_ports(self) -> None:
        """Raise `Invalid` where another program has a port that this one needs."""
        for what, port in self._ports().items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise Invalid(
                        f"{self.program} needs port {port} ({what}), and another program has it; "
                        "stop that one (an earlier `connito up`? then `connito down`) or choose another port"
                    ) from error

    def _ports(self) -> dict[str, int]:
        raise NotImplementedError

    def _pick(self) -> None:
        """Choose free ports."""
        raise NotImplementedError

    def _prepare(self) -> list[str]:
        """Write configuration files; the command line."""
        raise NotImplementedError

    def _not_ready(self) -> str:
        """Return what is missing, or the empty string."""
        raise NotImplementedError

    def _clean_up(self) -> None:
        """Clean up after the process has ended."""


class NatsServer(Server):
    """nats-server with JetStream that syncs every acknowledged message to disk.

    With `accounts`, those let in whose passes they sign; without, everybody, and into the one account that the data are of.
    """

    program = "nats-server"

    def __init__(
        self,
        data_dir: Path,
        port: int = 0,
        accounts: Accounts | None = None,
        log_file: Path | None = None,
        *,
        die_with_parent: bool = True,
    ) -> None:
        super().__init__(data_dir, log_file, die_with_parent=die_with_parent)
        self._asked, self.accounts, self._name = port, accounts, ""
        self._pick()

    @property
    def url(self) -> str:
        """Return the value of CONNITO_NATS_URL."""
        return f"nats://127.0.0.1:{self.port}"

    async def stuck(self) -> str:
        """Return why a stream takes nothing more."""
        return "" if self.accounts is None else await self.accounts.write_error(self.url)

    def _ports(self) -> dict[str, int]:
        return {"clients": self.port}

    def _pick(self) -> None:
        self.port = self._asked or free_ports(1)[0]

    def _prepare(self) -> list[str]:
        self._name = self._own_name()
        write_durably(self.data_dir / "nats-server.conf", json.dumps(self._config(), indent=2))
        return [find_program(self.program), "-c", "nats-server.conf"]

    def _own_name(self) -> str:
        return f"connito-local-{secrets.token_hex(8)}"

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.port,
            "server_name": self._name,
            **SERVER,
            "jetstream": {"store_dir": "jetstream", **JETSTREAM},
        }
        # The server keeps streams in a folder that is named after their account; `$G` where there were none.
        stored = self.data_dir / "jetstream" / "jetstream"
        if self.accounts is None:
            account = next((path.name for path in stored.glob("A*")), "")
            return config | (_open(account) if account else {})
        if (stored / "$G").exists() and not (stored / self.accounts.platform).exists():
            (stored / "$G").rename(stored / self.accounts.platform)
        return config | self.accounts.server("jwt")

    def _not_ready(self) -> str:
        """Return whether this server, and no other one, accepts clients, as it does once JetStream has recovered."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                greeting = connection.recv(4096)
        except OSError as error:
            return str(error)
        known = (b"INFO ", b'"jetstream":true', self._name.encode())
        return "" if all(part in greeting for part in known) else "no greeting of its own"


class ObjectStore(Server):
    """SeaweedFS in one process: master, volume server, filer and S3 gateway; it syncs every acknowledged object to disk."""

    program = "weed"
    ACCESS_KEY = "connito"

    def __init__(
        self,
        data_dir: Path,
        access_key: str = ACCESS_KEY,
        secret_key: str = "connito-local-secret",  # noqa: S107 - guards a port on the loopback interface
        port: int = 0,
        log_file: Path | None = None,
        *,
        identities: Sequence[Mapping[str, Any]] | None = None,
        die_with_parent: bool = True,
    ) -> None:
        super().__init__(data_dir, log_file, die_with_parent=die_with_parent)
        self.access_key, self.secret_key = access_key, secret_key
        self.identities = identities
        self._known = {"s3": port} if port else {}
        self._pick()

    @property
    def url(self) -> str:
        """Return the value of CONNITO_S3_ENDPOINT."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    def _ports(self) -> dict[str, int]:
        return self.ports

    def _pick(self) -> None:
        names = ("s3", "master", "volume", "filer")
        chosen = free_ports(2 * len(names))
        self.ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], chosen, strict=True)) | self._known

    def _prepare(self) -> list[str]:
        identities = self.identities or [
            {
                "name": "connito",
                "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
        ]
        write_durably(self.data_dir / "s3.json", json.dumps({"identities": list(identities)}, indent=2), 0o600)
        durable_objects.prepare(self.data_dir)
        store_guard.write(self.data_dir)
        arguments = {
            "dir": "objects",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            # One master: no election, which would take two more seconds.
            "master.peers": "none",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 1024,
            # Room of removed objects comes back within minutes, not within a quarter of an hour.
            "master.vacuumIntervalSeconds": 60,
            # Volumes grow as they fill; counting them in advance against the free disk runs out after a few buckets.
            "volume.max": 10000,
            "volume.preStopSeconds": 0,
            # Its parts ask each other over gRPC, by certificate; HTTP would answer everybody.
            "disableHttp": "true",
            "filer": "true",
            "s3": "true",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": "s3.json",
        }
        for name, port in self.ports.items():
            service, _, grpc = name.partition(".")
            arguments[f"{service}.port{'.grpc' if grpc else ''}"] = port
        return [find_program(self.program), "server", *(f"-{name}={value}" for name, value in arguments.items())]

    def _not_ready(self) -> str:
        """Return whether an object can be stored and read back; the gateway answers seconds earlier."""
        with store_guard.channel(self.data_dir, self.ports["filer.grpc"]) as filer:
            return durable_objects.not_synced(filer) or self._probe()

    def _probe(self) -> str:
        import urllib3
        from minio import Minio
        from minio.error import MinioException

        client = Minio(
            f"127.0.0.1:{self.ports['s3']}",
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=False,
            region="us-east-1",
            http_client=urllib3.PoolManager(timeout=2, retries=False),
        )
        bucket, body = "connito-probe", b"ready?"
        try:
            if not client.bucket_exists(bucket):
                client.make_bucket(bucket)
            client.put_object(bucket, "probe", io.BytesIO(body), len(body))
            response = client.get_object(bucket, "probe")
            try:
                return "" if response.read() == body else "the probe object came back changed"
            finally:
                response.close()
                response.release_conn()
        except (MinioException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return f"no object can be stored yet ({type(error).__name__})"

    def _clean_up(self) -> None:
        for name, port in self.ports.items():
            service = name.partition(".")[0]
            for path in (f"seaweedfs-{service}-grpc-{port}.sock", f"seaweedfs-{service}-{port}.sock"):
                (Path("/tmp") / path).unlink(missing_ok=True)  # noqa: S108 - where the server puts them


def _open(account: str) -> dict[str, Any]:
    """Return the configuration that lets everybody into one account, under its own name."""
    users = [{"user": "anybody", "password": "anybody"}]
    return {"accounts": {account: {"jetstream": "enabled", "users": users}}, "no_auth_user": "anybody"}
