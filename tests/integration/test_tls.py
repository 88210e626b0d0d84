"""TLS with real handshakes: a nats-server and an API, and by name what is wrong with each certificate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from connito.bus import Bus
from connito.errors import Fatal, Invalid, Retry
from connito.local.doctor_platform import Check, _expiries
from connito.platform.servers import NatsServer
from connito.platform.session import Session
from connito.service import rpc
from connito.v1 import reasons_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.tls import Tls
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.authority import Authority
from tests.support.waiting import declared

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
