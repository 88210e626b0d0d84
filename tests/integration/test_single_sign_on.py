"""People sign in at a certified OpenID provider (npm's oidc-provider), and read at the console and at the coordinator's API."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlencode, urljoin, urlsplit

import httpx2
import pytest
from connito.client import Client
from connito.errors import Invalid, NotFound
from connito.platform.servers import NatsServer, ObjectStore, free_ports
from connito.service.oidc import Provider as Known
from connito.service.oidc import Tokens
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from services.console.sign_in import ASK_SECONDS, SESSION, SignIn
from tests.integration.conftest import BusFactory
from tests.integration.test_console import Console
from tests.integration.test_library import deposited, finish
from tests.integration.test_selector import store_env
from tests.integration.witness import ServiceProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

PACKAGE = "oidc-provider@9.13.3"
SUPPORT = Path(__file__).parents[1] / "support"
RESOURCE = "https://connito.example.com"
SECRET = "the secret of: the/console"


@dataclass(frozen=True)
class Provider:
    issuer: str
    console: int

    @property
    def back(self) -> str:
        return f"http://127.0.0.1:{self.console}/sign-in/back"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the provider's package, or a skip that says so."""
    folder = tmp_path_factory.mktemp("provider")
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("NO PROVIDER WAS RUN: npm and node are not installed")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"NO PROVIDER WAS RUN: {PACKAGE} cannot be installed: {done.stderr[-300:]}")
    return folder


@pytest.fixture
def provider(package: Path) -> Iterator[Provider]:
    port, console = free_ports(2)
    found = Provider(f"http://127.0.0.1:{port}", console)
    command = ["node", str(SUPPORT / "provider.mjs"), str(port), found.back]
    with subprocess.Popen(
        command, cwd=package, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield found
        process.kill()


@dataclass(frozen=True)
class House:
    """A broker with a public run, the clinic's and a bank's; a console and a coordinator that know the provider."""

    console: Console
    coordinator: ServiceProcess


@pytest.fixture
async def house(
    provider: Provider, own_nats: NatsServer, bus_factory: BusFactory, tmp_path: Path, identities: dict[str, Identity],
    roster: Roster,
) -> AsyncIterator[House]:  # fmt: skip
    customer = identities["customer"]
    known = replace(roster, organisations={"clinic": frozenset({customer.public}), "bank": frozenset()})
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    shown = {
        "open": ("", ""),
        "ward": ("organisation", "clinic"),
        "vault": ("organisation", "bank"),
        "own": ("private", ""),
    }
    for run, (visibility, organisation) in shown.items():
        spec = run_pb2.RunSpec(
            run=run, domain="medical", cycles=1, customer=customer.public, visibility=visibility, organisation=organisation,
        )  # fmt: skip
        assert await bus.publish_fact(run, "run", 0, "created", run_pb2.RunCreated(spec=spec))
    env = {
        "CONNITO_NATS_URL": own_nats.url, "CONNITO_OIDC_ISSUER": provider.issuer, "CONNITO_OIDC_AUDIENCE": "connito",
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    page = {
        "CONNITO_CONSOLE_PORT": str(provider.console), "CONNITO_CONSOLE_URL": f"http://127.0.0.1:{provider.console}",
        "CONNITO_CONSOLE_OIDC_CLIENT": "console", "CONNITO_CONSOLE_OIDC_SECRET": SECRET,
        "CONNITO_CONSOLE_OIDC_SCOPES": "openid groups",
    }  # fmt: skip
    console = Console("console", tmp_path / "console", customer, known, {**env, **page})
    coordinator = ServiceProcess("coordinator", tmp_path / "coordinator", identities["coordinator"], known, env)
    console.start()
    coordinator.start()
    await console.read_everything()
    await asyncio.to_thread(coordinator.wait_for_log, '"event": "ready"')
    yield House(console, coordinator)
    console.kill()
    coordinator.kill()


class Browser:
    """Somebody with a browser of their own, who fills in what a provider asks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.http = httpx2.AsyncClient(trust_env=False, timeout=20, headers={"Accept": "text/html"})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def get(self, url: str) -> httpx2.Response:
        return await self.http.get(url)

    async def sign_in(self, url: str, stop: str = "") -> httpx2.Response:
        """Go where one is sent, through the provider's forms, until a page is there, or an address that begins with `stop`."""
        answer = await self.get(url)
        for _ in range(20):
            if answer.is_redirect:
                url = urljoin(url, answer.headers["location"])
                if stop and url.startswith(stop):
                    return answer
                answer = await self.get(url)
            elif form := re.search(r'<form[^>]*action="([^"]+)"', answer.text) if "/interaction/" in url else None:
                prompt = "consent" if 'value="consent"' in answer.text else "login"
                url = urljoin(url, form[1])
                answer = await self.http.post(url, data={"prompt": prompt, "login": self.name, "password": "any"})
            else:
                return answer
        raise AssertionError(f"sent round and round: {url}")


def runs_in(page: str) -> set[str]:
    return set(re.findall(r'href="/runs/([a-z]+)"', page))


async def test_readers_see_what_their_organisation_may(house: House, provider: Provider) -> None:
    address = f"http://127.0.0.1:{provider.console}"
    async with Browser("mallory") as stranger, Browser("ada") as ada, Browser("bob") as bob:
        await look_around(address, provider, stranger, ada, bob)


async def look_around(address: str, provider: Provider, stranger: Browser, ada: Browser, bob: Browser) -> None:
    refused = await stranger.http.get(f"{address}/", headers={"Accept": "application/json"})
    assert refused.status_code == 401
    assert (await stranger.get(f"{address}/")).headers["location"] == "/sign-in"

    for who, seen in ((ada, {"open", "ward"}), (bob, {"open"})):
        page = await who.sign_in(f"{address}/")
        assert page.status_code == 200, page.text
        assert runs_in(page.text) == seen
        assert (await who.get(f"{address}/runs/open")).status_code == 200
        for hidden in ("/runs/vault", "/runs/own", "/bus", "/dead-letters"):
            assert (await who.get(address + hidden)).status_code == 404
    # Who was sent back twice, or from another browser, is not let in by what is in the address.
    begun = await stranger.sign_in(f"{address}/sign-in", stop=provider.back)
    again = await bob.get(begun.headers["location"])
    assert again.status_code == 403
    assert "did not begin in this browser" in again.text
    assert runs_in((await bob.get(f"{address}/")).text) == {"open"}
    first = await stranger.get(begun.headers["location"])
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert (await stranger.get(begun.headers["location"])).status_code == 403
    # Out again.
    await ada.http.post(f"{address}/logout")
    assert (await ada.get(f"{address}/")).headers["location"] == "/sign-in"


async def token_of(who: str, provider: Provider) -> tuple[str, str]:
    """An access token for the API and the ID token, as a program of the reader's gets them."""
    verifier = secrets.token_urlsafe(40)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    asked = {
        "client_id": "console", "response_type": "code", "redirect_uri": provider.back, "scope": "openid groups",
        "code_challenge": challenge, "code_challenge_method": "S256", "resource": RESOURCE,
    }  # fmt: skip
    async with Browser(who) as browser:
        sent = await browser.sign_in(f"{provider.issuer}/auth?{urlencode(asked)}", stop=provider.back)
        return await redeemed(
            browser, provider, parse_qs(urlsplit(sent.headers["location"]).query)["code"][0], verifier
        )


async def redeemed(browser: Browser, provider: Provider, code: str, verifier: str) -> tuple[str, str]:
    form = {
        "grant_type": "authorization_code", "code": code, "redirect_uri": provider.back, "code_verifier": verifier,
        "client_id": "console", "client_secret": SECRET, "resource": RESOURCE,
    }  # fmt: skip
    answer = (await browser.http.post(f"{provider.issuer}/token", data=form)).json()
    return answer["access_token"], answer["id_token"]


async def test_a_role_that_is_taken_away_there_is_gone_here_within_a_minute(provider: Provider) -> None:
    now, roster = time.time(), Roster(organisations={"clinic": frozenset()})
    tokens = Tokens(Known(provider.issuer), "connito", "groups", roster)
    signing = SignIn(
        tokens, "console", SECRET, provider.back.removesuffix("/sign-in/back"), "openid groups", b"k" * 32, lambda: now
    )
    place, flow = await signing.begin()
    async with Browser("ada") as browser:
        sent = await browser.sign_in(place, stop=provider.back)
        back = {name: values[0] for name, values in parse_qs(urlsplit(sent.headers["location"]).query).items()}
        cookies = {SESSION: await signing.end(back, flow)}
        await browser.get(f"{provider.issuer}/dismiss")
    seen = await signing.viewer(cookies)
    assert seen is not None
    assert seen.organisations == {"clinic"}
    now += ASK_SECONDS
    seen = await signing.viewer(cookies)
    assert seen is not None
    assert not seen.organisations


async def test_programs_read_with_a_token_and_change_nothing(house: House, provider: Provider) -> None:
    access, identity = await token_of("ada", provider)
    address = f"http://127.0.0.1:{provider.console}/"
    async with httpx2.AsyncClient(trust_env=False, timeout=20) as http:
        page = await http.get(address, headers={"Authorization": f"Bearer {access}"})
        assert runs_in(page.text) == {"open", "ward"}
        # The ID token is for the console's own sign-in, and signed by the same key.
        for wrong in (identity, access[:-2], "x"):
            answer = await http.get(address, headers={"Authorization": f"Bearer {wrong}"})
            assert (answer.status_code, "this sign-in does not count" in answer.text) == (401, True)

    def listed(token: str) -> set[str]:
        with Client(f"127.0.0.1:{house.coordinator.ports['grpc']}", token=token) as client:
            return {status.spec.run for status in client.job.list()}

    assert await asyncio.to_thread(listed, access) == {"open", "ward"}
    assert await asyncio.to_thread(listed, (await token_of("bob", provider))[0]) == {"open"}
    with pytest.raises(Invalid, match="its audience is not"):
        await asyncio.to_thread(listed, identity)
    with (
        Client(f"127.0.0.1:{house.coordinator.ports['grpc']}", token=access) as client,
        pytest.raises(Invalid, match="customer's key"),
    ):
        await asyncio.to_thread(client.job.cancel, "ward", "because")


async def test_a_token_shows_the_experts_that_its_organisation_may_see(
    provider: Provider, own_nats: NatsServer, bus_factory: BusFactory, tmp_path: Path, identities: dict[str, Identity],
    roster: Roster, object_store: ObjectStore, store: ArtifactStore,
) -> None:  # fmt: skip
    customer = identities["customer"]
    known = replace(roster, organisations={"clinic": frozenset({customer.public}), "bank": frozenset()})
    buses = {
        role: await bus_factory(identities[role], own_nats.url) for role in ("coordinator", "selector", "aggregator")
    }
    env = {
        "CONNITO_NATS_URL": own_nats.url, "CONNITO_OIDC_ISSUER": provider.issuer, "CONNITO_OIDC_AUDIENCE": "connito",
        "NO_PROXY": "127.0.0.1", **store_env(object_store, store),
    }  # fmt: skip
    library = ServiceProcess("library", tmp_path / "library", identities["library"], known, env)
    try:
        await library.start().ready()
        experts = {}
        for name, owner, organisation in (("open", None, ""), ("ward", customer, "clinic"), ("own", customer, "")):
            await finish(buses, store, name, tmp_path, cycle_pb2.GATE_DECISION_ACCEPTED, owner, organisation)
            experts[name] = (await deposited(buses["coordinator"], known, name)).expert_id
        address = f"127.0.0.1:{library.ports['grpc']}"

        def seen(token: str) -> tuple[set[str], set[str]]:
            with Client(library=address, token=token) as client:
                listed = {expert.expert_id for expert in client.library.list()}
                shown = set()
                for name in experts.values():
                    with suppress(NotFound):
                        shown.add(client.library.show(name)[0].expert_id)
                return listed, shown

        ada, identity = await token_of("ada", provider)
        for token, names in ((ada, {"open", "ward"}), ((await token_of("bob", provider))[0], {"open"}), ("", {"open"})):
            may = {experts[name] for name in names}
            assert await asyncio.to_thread(seen, token) == (may, may)
        with pytest.raises(Invalid, match="its audience is not"):
            await asyncio.to_thread(seen, identity)
    finally:
        library.kill()
