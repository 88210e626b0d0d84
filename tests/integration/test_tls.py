"""TLS with real handshakes: a nats-server and an API, and by name what is wrong with each certificate."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from connito.bus import Bus
from connito.client.connection import Connection
from connito.errors import ConnitoError, Fatal, Invalid, Retry
from connito.local.doctor_platform import Check, _expiries
from connito.platform.servers import NatsServer, find_program, free_ports
from connito.platform.session import Session
from connito.service import rpc
from connito.store import ArtifactStore, ref_of_bytes
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC
from connito.v1.services_pb2 import RequestDownloadsRequest
from connito.v1.services_pb2_grpc import SubmissionServiceStub
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.tls import Tls
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.trainer.adapters import Services
from tests.authority import Authority
from tests.support.waiting import PATIENCE, declared, until
from tests.unit.helm.conftest import render, values_of

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

UNTRUSTED = reasons_pb2.REASON_CERTIFICATE_UNTRUSTED
EXPIRED = reasons_pb2.REASON_CERTIFICATE_EXPIRED
REQUIRED = reasons_pb2.REASON_CERTIFICATE_REQUIRED


class Certificates:
    """Of an authority of ours and of a stranger."""

    def __init__(self, folder: Path) -> None:
        ours, strange = Authority.make(folder / "ours"), Authority.make(folder / "strange", "stranger")
        self.trust, self.distrust = Tls(ca=ours.certificate), Tls(ca=strange.certificate)
        self.server, self.client = ours.issue("server"), ours.issue("client")
        self.old_server, self.old_client = ours.issue("old-server", -1), ours.issue("old-client", -1)
        self.strange_client = replace(strange.issue("strange"), ca=ours.certificate)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki"))


class TlsServer(NatsServer):
    """A broker with a certificate; `verify`: it asks for one."""

    own: Tls
    verify = False

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        config["tls"] = {"cert_file": str(self.own.certificate), "key_file": str(self.own.key)}
        if self.verify:
            config["tls"] |= {"ca_file": str(self.own.ca), "verify": True}
        return config

    @property
    def url(self) -> str:
        return f"tls://127.0.0.1:{self.port}"


@pytest.fixture
def broker(tmp_path: Path, request: pytest.FixtureRequest, pki: Certificates) -> Iterator[TlsServer]:
    kind = getattr(request, "param", "tls")
    server = TlsServer(tmp_path / "nats")
    server.own, server.verify = (pki.old_server if kind == "old" else pki.server), kind == "mtls"
    with server:
        yield server


async def connected(broker: TlsServer, tls: Tls) -> int:
    """How many streams a client can declare."""
    async with await Bus.connect(broker.url, Identity.generate(), "test", tls=tls) as bus:
        return len(await declared(bus.js))


async def refused(broker: TlsServer, tls: Tls, reason: int) -> None:
    with pytest.raises(Invalid) as caught:
        await connected(broker, tls)
    assert caught.value.reason == reason, str(caught.value)


async def test_the_bus_over_tls(broker: TlsServer, pki: Certificates) -> None:
    assert await connected(broker, pki.trust) > 5
    await refused(broker, pki.distrust, UNTRUSTED)
    await refused(broker, Tls(), UNTRUSTED)


@pytest.mark.parametrize("broker", ["old"], indirect=True)
async def test_a_broker_whose_certificate_has_expired(broker: TlsServer, pki: Certificates) -> None:
    await refused(broker, pki.trust, EXPIRED)


@pytest.mark.parametrize("broker", ["mtls"], indirect=True)
async def test_the_bus_with_certificates_on_both_sides(broker: TlsServer, pki: Certificates) -> None:
    assert await connected(broker, pki.client) > 5
    await refused(broker, pki.trust, REQUIRED)
    await refused(broker, pki.strange_client, REQUIRED)


async def ask(port: int, tls: Tls) -> int:
    address = f"127.0.0.1:{port}"
    async with rpc.channel(address, tls) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            return int((await rpc.call(check, health_pb2.HealthCheckRequest(), 5)).status)
        except Retry as error:
            raise await rpc.explained(error, address, tls) from error


async def not_answered(port: int, tls: Tls, reason: int) -> None:
    with pytest.raises(Invalid) as caught:
        await ask(port, replace(tls, api="tls"))
    assert caught.value.reason == reason, str(caught.value)


@pytest.mark.parametrize("broker", ["tls", "mtls", "old"], indirect=True)
async def test_the_doctor_trusts_what_the_bus_trusts(broker: TlsServer, pki: Certificates) -> None:
    async def line(tls: Tls) -> Check:
        session = Session(broker.url, Identity.generate(), Roster(), tls=tls)
        (check,) = await _expiries(session)
        return check

    mine = replace(pki.client, ca=pki.trust.ca)
    if broker.own is pki.old_server:
        said = await line(mine)
        assert (said.ok, "has expired" in said.found, said.remedy.startswith("renew it")) == (False, True, True)
        return
    good = await line(mine)
    assert good.found.startswith("valid until"), "the authority that CONNITO_TLS_CA names signed it"
    strange = await line(pki.distrust)
    assert (strange.ok, "CONNITO_TLS_CA names the authority to trust" in strange.remedy) == (False, True)


async def test_an_api_over_tls(pki: Certificates) -> None:
    async with rpc.serve([], "127.0.0.1", 0, tls=replace(pki.server, api="tls")) as port:
        assert await ask(port, replace(pki.trust, api="tls")) == health_pb2.HealthCheckResponse.SERVING
        await not_answered(port, pki.distrust, UNTRUSTED)
        with pytest.raises(Retry):
            await ask(port, Tls())
    async with rpc.serve([], "127.0.0.1", 0, tls=replace(pki.old_server, api="tls")) as port:
        await not_answered(port, pki.trust, EXPIRED)


async def test_an_api_with_certificates_on_both_sides(pki: Certificates) -> None:
    async with rpc.serve([], "127.0.0.1", 0, tls=replace(pki.server, api="mtls")) as port:
        assert await ask(port, replace(pki.client, api="mtls")) == health_pb2.HealthCheckResponse.SERVING
        await not_answered(port, pki.trust, REQUIRED)
        await not_answered(port, pki.old_client, REQUIRED)


async def test_a_renewed_certificate_is_served_without_a_restart(pki: Certificates, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(source: Tls) -> None:
        assert source.certificate is not None
        assert source.key is not None
        certificate.write_bytes(source.certificate.read_bytes())
        key.write_bytes(source.key.read_bytes())

    install(pki.old_server)
    serving = Tls(pki.server.ca, certificate, key, "tls")
    async with rpc.serve([], "127.0.0.1", 0, tls=serving) as port:
        await not_answered(port, pki.trust, EXPIRED)
        install(pki.server)
        assert await ask(port, replace(pki.trust, api="tls")) == health_pb2.HealthCheckResponse.SERVING


def bundle(path: Path, *authorities: Authority) -> Path:
    """Put authorities into a file, as what mounts a Secret does: the old content or the new one, nothing between."""
    (fresh := path.with_suffix(".new")).write_bytes(b"".join(one.certificate.read_bytes() for one in authorities))
    fresh.replace(path)
    return path


class Pair:
    """Two authorities, of which the second follows on the first, and files of a service's own that are renewed in place."""

    def __init__(self, folder: Path) -> None:
        self.old, self.new = Authority.make(folder / "old"), Authority.make(folder / "new", "next")
        self.mine = Tls(bundle(folder / "ca.pem", self.old), folder / "own.pem", folder / "own.key")
        self.served = Tls(folder / "both.pem", folder / "served.pem", folder / "served.key")
        assert self.served.ca is not None
        bundle(self.served.ca, self.old, self.new)
        self.install(self.mine, self.old)
        self.install(self.served, self.old)

    @staticmethod
    def install(into: Tls, authority: Authority, days: int = 10) -> None:
        made = authority.issue(f"made{time.monotonic_ns()}", days)
        for target, source in ((into.certificate, made.certificate), (into.key, made.key)):
            assert target is not None
            assert source is not None
            target.write_bytes(source.read_bytes())


@pytest.mark.parametrize("late", [False, True], ids=["overlap", "late"])
@pytest.mark.parametrize("verify", [False, True], ids=["tls", "mtls"])
async def test_a_running_service_follows_another_authority_and_a_renewed_certificate(
    tmp_path: Path, verify: bool, late: bool
) -> None:
    """As cert-manager does it: files are replaced under who uses them, in time, or after the broker shows its new one."""
    both = Pair(tmp_path)
    server = TlsServer(tmp_path / "nats")
    server.own, server.verify = both.served, verify

    def follow() -> None:
        assert both.mine.ca is not None
        bundle(both.mine.ca, both.old, both.new)
        both.install(both.mine, both.new)

    with server:
        # What it was started with runs out as well: no connection may need it any more.
        both.install(both.mine, both.old, days=1)
        async with await Bus.connect(server.url, Identity.generate(), "test", tls=both.mine) as bus:
            returned = asyncio.Event()
            bus.connection.on_reconnect.append(returned.set)
            both.install(both.served, both.new)
            assert server.process is not None
            server.process.send_signal(signal.SIGHUP)
            await bus.connection.nc.flush()
            if not late:
                follow()
            server.kill()
            server.start()
            if late:
                await until(lambda: bus.connection._refused_certificate is not None)
                found = bus.connection._refused_certificate
                assert found is not None
                assert found.reason == UNTRUSTED
                follow()
            await until(returned.is_set)
            await bus.connection.nc.flush()
            # The overlap is over: what the old one signed is believed no more, by a process that had trusted it.
            assert both.mine.ca is not None
            bundle(both.mine.ca, both.new)
            both.install(both.served, both.old)
            server.kill()
            server.start()
            await until(lambda: bus.connection._refused_certificate is not None)
            assert not bus.connection.connected
            # Who is told to stop meanwhile stops.
            async with asyncio.timeout(PATIENCE):
                await bus.close()


class Told(TlsServer):
    """A broker that says where it is, as the chart's does."""

    @property
    def pid_file(self) -> Path:
        return self.data_dir.absolute() / "nats.pid"

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"pid_file": str(self.pid_file)}


def reloading(secret: Path, pid_file: Path) -> subprocess.Popen[bytes]:
    """What the chart runs beside its broker, over these files."""
    values = values_of("bundled-nats")
    objects = render({**values, "nats": {**values["nats"], "tlsSecret": "secret"}})
    pods = [one["spec"]["template"]["spec"] for one in objects if one["kind"] == "StatefulSet"]
    ((pod, reload),) = [(pod, one) for pod in pods for one in pod["containers"] if one["name"] == "reload"]
    assert pod["shareProcessNamespace"], "a process of another container can be told nothing"
    (script,) = reload["args"]
    places = {"/etc/nats-tls": str(secret), "/var/run/nats/nats.pid": str(pid_file), "sleep 10": "sleep 0.1"}
    for there, here in places.items():
        assert there in script
        script = script.replace(there, here)
    programs = Path(find_program("nats-server")).parent
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.Popen([*reload["command"], script], env=path, start_new_session=True)


async def test_the_charts_broker_shows_a_renewed_certificate_and_keeps_its_clients(tmp_path: Path) -> None:
    """nats-server reads its files when told to: the script of the rendered chart does that, here against a real one."""
    both = Pair(tmp_path)
    (secret := tmp_path / "secret").mkdir()
    server = Told(tmp_path / "nats")
    server.own = Tls(bundle(secret / "ca.crt", both.old), secret / "tls.crt", secret / "tls.key")
    both.install(server.own, both.old)
    trusting, only_new = Tls(bundle(tmp_path / "trust.pem", both.old, both.new)), Tls(both.new.certificate)
    with server:
        async with await Bus.connect(server.url, Identity.generate(), "test", tls=trusting) as bus:
            lost: list[bool] = []
            bus.connection.on_reconnect.append(lambda: lost.append(True))
            watching = await asyncio.to_thread(reloading, secret, server.pid_file)
            try:
                await refused(server, only_new, UNTRUSTED)
                both.install(server.own, both.new)
                shown = False
                async with asyncio.timeout(PATIENCE):
                    while not shown:
                        assert watching.poll() is None
                        with suppress(Invalid):
                            await connected(server, only_new)
                            shown = True
            finally:
                os.killpg(watching.pid, signal.SIGKILL)
                watching.wait()
            await bus.connection.nc.flush()
            assert not lost


async def test_the_stores_authority_is_followed_and_its_certificate_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Pair(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(both.mine.ca))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async def said(made: Tls) -> str:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        assert made.certificate is not None
        context.load_cert_chain(made.certificate, made.key)
        async with await asyncio.start_server(answer, "127.0.0.1", port, ssl=context):
            try:
                return str(await store.stat(ref_of_bytes(b"x", "", REALM_PUBLIC)))
            except Retry as error:
                return str(error)

    (port,) = free_ports(1)
    store = ArtifactStore(f"https://127.0.0.1:{port}", "key", "secret", "bucket", "us-east-1", tmp_path / "cache")
    assert await said(both.served) == "None"
    assert (await said(both.old.issue("gone", -1))).startswith(
        f"a certificate between here and the store at {store.endpoint} has expired"
    )
    both.install(both.served, both.new)
    untrusted = await said(both.served)
    assert untrusted.startswith(f"the certificate of the store at {store.endpoint} is not to be trusted here")
    assert "set SSL_CERT_FILE" in untrusted
    assert both.mine.ca is not None
    bundle(both.mine.ca, both.old, both.new)
    assert await said(both.served) == "None"


async def test_calls_follow_another_authority_and_a_renewed_certificate(tmp_path: Path) -> None:
    both = Pair(tmp_path)
    mine = replace(both.mine, api="mtls")
    bus: Any = SimpleNamespace(tls=mine, identity=Identity.generate(), seal=lambda *_: None)

    async def unanswered(way: Callable[[], Any]) -> bool:
        """Whether a call got as far as the API, which has no such service."""
        try:
            await way()
        except Retry:
            return True
        except ConnitoError:
            return False
        raise AssertionError("the API serves nothing")

    async with rpc.serve([], "127.0.0.1", 0, tls=replace(both.served, api="mtls")) as port:

        async def find(_: str) -> str:
            return f"127.0.0.1:{port}"

        bus.find_endpoint = find
        trainer, client = Services(bus), Connection(lambda _: f"127.0.0.1:{port}", bus.identity, mine)
        ways: list[Callable[[], Any]] = [
            lambda: trainer._call("committer", SubmissionServiceStub, "RequestDownloads", RequestDownloadsRequest()),
            lambda: asyncio.to_thread(client.call, "committer", "RequestDownloads", RequestDownloadsRequest()),
        ]
        assert [await unanswered(way) for way in ways] == [False, False]
    both.install(both.served, both.new)
    assert both.mine.ca is not None
    bundle(both.mine.ca, both.new)
    both.install(both.mine, both.new)
    # It comes again at the same address, and shows the new one; of whom it asks, the old one's are refused.
    assert both.served.ca is not None
    bundle(both.served.ca, both.new)
    async with rpc.serve([], "127.0.0.1", port, tls=replace(both.served, api="mtls")):
        assert [await unanswered(way) for way in ways] == [False, False]
        await trainer.close()
        client.close()


def test_what_is_missing_is_named(pki: Certificates, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="CONNITO_TLS_KEY"):
        Tls(certificate=tmp_path / "cert.pem")
    with pytest.raises(Fatal, match="CONNITO_TLS_CERT"):
        Tls(api="tls").server_credentials()
    with pytest.raises(Fatal, match="CONNITO_TLS_CA"):
        replace(pki.server, ca=None, api="mtls").server_credentials()
    with pytest.raises(Fatal, match=r"missing\.pem"):
        Tls(ca=tmp_path / "missing.pem").context()
    with pytest.raises(Invalid, match="off, tls or mtls"):
        Tls.from_environment({"CONNITO_GRPC_TLS": "yes"})
