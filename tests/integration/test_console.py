"""The console as a process, over a real broker: pages, the event stream, and who gets in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx2
import pytest
from connito.bus import Bus
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer, ObjectStore
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.v1.reasons_pb2 import REASON_COPY, REASON_MALFORMED
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.subjects import DLQ_ROOT

from tests.integration.conftest import BusFactory
from tests.integration.test_selector import store_env
from tests.integration.witness import ServiceProcess
from tests.support.desk import desk
from tests.support.run import enrolment
from tests.support.waiting import PATIENCE, declared

pytestmark = pytest.mark.integration

TOKEN = "a-token-for-this-test"
SELF = Identity.generate()
MINER = SELF.public


class Console(ServiceProcess):
    """`python -m services.console`."""

    async def listening(self) -> str:
        """Wait for the page; its address."""
        async with asyncio.timeout(PATIENCE):
            while "console" not in self.ports:
                assert self.process is not None
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)
        return f"http://127.0.0.1:{self.ports['console']}"

    async def read_everything(self) -> str:
        """Wait until the log has been read; the page's address."""
        address = await self.listening()
        await asyncio.to_thread(self.wait_for_log, '"event": "ready"')
        return address


@pytest.fixture
def process(own_nats: NatsServer, tmp_path: Path, identities: dict[str, Identity], roster: Roster) -> Iterator[Console]:
    console = Console(
        "console", tmp_path / "console", identities["customer"], roster, {"CONNITO_NATS_URL": own_nats.url}
    )
    yield console
    console.kill()


@pytest.fixture
async def buses(own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]) -> dict[str, Bus]:
    roles = ("coordinator", "selector", "aggregator", "validator", "committer")
    return {role: await bus_factory(identities[role], own_nats.url) for role in roles}


@pytest.fixture
async def browser() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(trust_env=False, timeout=10, headers={"Accept": "text/html"}) as client:
        yield client


async def create(buses: dict[str, Bus], run: str) -> None:
    spec = run_pb2.RunSpec(run=run, domain="medical", cycles=2, base=run_pb2.BaseRef(name="tiny-base"))
    assert await buses["coordinator"].publish_fact(run, "run", 0, "created", run_pb2.RunCreated(spec=spec))


async def one_cycle(buses: dict[str, Bus], run: str) -> None:
    """A cycle with a report, verdicts and a version."""
    validator = buses["validator"].identity.public
    layers = [run_pb2.LayerSelection(layer=3, experts=[7, 1])]
    selection = run_pb2.SelectionMade(run=run, layers=layers, selected_experts=2, total_experts=32)
    score = cycle_pb2.SubmissionScore(miner=MINER, effect=0.01, effect_low=-0.01, effect_high=0.03, reason=REASON_COPY)
    verdict = cycle_pb2.Verdict(
        miner=MINER, status=cycle_pb2.VERDICT_STATUS_REJECTED, reason=REASON_COPY, detail="of <i>another</i>"
    )
    losses = [cycle_pb2.DomainLoss(domain="medical", before=2.5, after=2.25)]
    version = cycle_pb2.VersionPublished(
        run=run, cycle=1, version=1, losses=losses, gate=cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE
    )
    report = cycle_pb2.ScoreReport(run=run, cycle=1, validator=validator, scores=[score])
    for role, section, cycle, kind, message, who in (
        ("selector", "run", 0, "selected", selection, ""),
        ("coordinator", "run", 0, "miner", enrolment(run, SELF, "mallory"), MINER),
        ("coordinator", "train", 1, "opened", cycle_pb2.WindowOpened(run=run, cycle=1, expected=[MINER]), ""),
        ("validator", "validate", 1, "report", report, validator),
        ("aggregator", "merge", 1, "scored", cycle_pb2.CycleScored(run=run, cycle=1, verdicts=[verdict]), ""),
        ("aggregator", "merge", 1, "version", version, ""),
    ):
        assert await buses[role].publish_fact(run, section, cycle, kind, message, who)


async def pictures(browser: httpx2.AsyncClient, address: str) -> AsyncGenerator[str]:
    """The live part of a page, each time it looks different."""
    async with browser.stream("GET", address, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event, lines = "", []
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                lines.append(value)
            elif not line:
                if event == "live":
                    yield "\n".join(lines)
                event, lines = "", []


async def test_pages_show_what_is_in_the_log(
    process: Console, buses: dict[str, Bus], browser: httpx2.AsyncClient, run_id: str
) -> None:
    await create(buses, run_id)
    await one_cycle(buses, run_id)
    address = await process.start().read_everything()
    pages = {
        "/": (run_id, "tiny-base", "2.5000 → 2.2500"),
        f"/runs/{run_id}": ("mallory", "the same work as an earlier commitment", "<polyline", "of &lt;i&gt;another"),
        f"/runs/{run_id}/why/1/{MINER}": ("+0.0100", "-0.0100 … +0.0300", "rejected"),
        f"/runs/{run_id}/selection": ("layer 3, expert 7: selected, number 1 of its layer",),
        f"/runs/{run_id}/lineage": ("nothing to merge", "holds"),
        f"/runs/{run_id}?at=2": ("Replay, fact", "No version has been published yet"),
        "/library": ("The library is empty",),
        "/dead-letters": ("There are none",),
        "/bus": ("INGRESS", "connected"),
    }
    for path, expected in pages.items():
        answer = await browser.get(address + path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert " style=" not in answer.text
        for text in expected:
            assert text in answer.text, f"{text!r} is not on {path}:\n{answer.text}"
    for path in ("/runs/another", f"/runs/{run_id}/why/1/USTRANGER", "/nowhere", "/static/../settings.py"):
        assert (await browser.get(address + path)).status_code == 404
    assert (await browser.get(address + "/static/console.js")).headers["content-type"].startswith("text/javascript")
    assert process.drain() == 0


async def test_a_fact_arrives_on_an_open_page(
    process: Console, buses: dict[str, Bus], browser: httpx2.AsyncClient, run_id: str
) -> None:
    address = await process.start().read_everything()
    async with asyncio.timeout(PATIENCE), aclosing(pictures(browser, address + "/")) as live:
        assert "There is no run yet" in await anext(live)
        await create(buses, run_id)
        while run_id not in (picture := await anext(live)):
            pass
        assert "selecting the experts" in picture
    # An open stream does not keep the service from ending.
    async with asyncio.timeout(PATIENCE), aclosing(pictures(browser, f"{address}/runs/{run_id}")) as live:
        await anext(live)
        assert await asyncio.to_thread(process.drain) == 0


async def test_an_open_page_says_that_the_broker_is_gone_and_goes_on_when_it_is_back(
    process: Console, own_nats: NatsServer, buses: dict[str, Bus], browser: httpx2.AsyncClient, run_id: str
) -> None:
    address = await process.start().read_everything()
    async with asyncio.timeout(PATIENCE), aclosing(pictures(browser, address + "/")) as live:
        await asyncio.to_thread(own_nats.kill)
        while "The broker does not answer" not in await anext(live):
            pass
        await asyncio.to_thread(own_nats.start)
        while "The broker does not answer" in await anext(live):
            pass
        await create(buses, run_id)
        while run_id not in await anext(live):
            pass


async def test_dead_letters_are_shown_and_forged_ones_are_not(
    process: Console, buses: dict[str, Bus], browser: httpx2.AsyncClient, identities: dict[str, Identity]
) -> None:
    for role, sequence, detail in (("committer", 5, "cannot be read"), ("selector", 6, "nor this")):
        letter = cycle_pb2.DeadLetter(
            stream="INGRESS", sequence=sequence, subject="connito.v1.r.ingress.U.reveal", reason=REASON_MALFORMED,
            detail=detail, service=role,
        )  # fmt: skip
        # What `Bus.consume` does with a message that is refused for good.
        bus = buses["committer"] if role == "committer" else buses["validator"]
        subject = f"{DLQ_ROOT}.{letter.stream}.{letter.sequence}"
        await bus.js.publish(subject, bus._sealed(subject, letter))
    address = await process.start().read_everything()
    page = (await browser.get(address + "/dead-letters")).text
    assert "cannot be read" in page
    assert "nor this" not in page
    assert "Messages that do not verify" in (await browser.get(address + "/bus")).text


async def test_a_customers_permissions_are_enough(
    tmp_path: Path, identities: dict[str, Identity], roster: Roster, browser: httpx2.AsyncClient, run_id: str
) -> None:
    operator = Identity.generate()
    accounts = Accounts(tmp_path / "accounts")
    accounts.make()
    customer, coordinator = (accounts.welcome(role, identities[role]) for role in ("customer", "coordinator"))
    with NatsServer(tmp_path / "nats", accounts=accounts) as server:
        async with await Bus.connect(server.url, accounts.welcome("operator", operator), "operator", roster) as bus:
            await declared(bus.js)
        async with await Bus.connect(server.url, coordinator, "coordinator", roster) as bus:
            await create({"coordinator": bus}, run_id)
        console = Console("console", tmp_path / "console", customer, roster, {"CONNITO_NATS_URL": server.url})
        try:
            async with desk(server.url, accounts.welcome("committer", identities["committer"])):
                address = await console.start().read_everything()
                assert run_id in (await browser.get(address)).text
                page = (await browser.get(address + "/bus")).text
                assert "connected" in page
        finally:
            console.kill()


async def test_a_versions_bytes_are_verified_and_an_experts_card_is_shown(
    own_nats: NatsServer, object_store: ObjectStore, store: ArtifactStore, bus_factory: BusFactory, tmp_path: Path,
    identities: dict[str, Identity], roster: Roster, browser: httpx2.AsyncClient, buses: dict[str, Bus], run_id: str,
) -> None:  # fmt: skip
    await create(buses, run_id)
    state = await store.put_bytes(b"rows" * 1000, "application/octet-stream", REALM_PUBLIC)
    missing = ArtifactRef(digest="ab" * 32, size=10, realm=REALM_PUBLIC)
    made = run_pb2.SelectionMade(run=run_id, initial_state=state)
    assert await buses["selector"].publish_fact(run_id, "run", 0, "selected", made)
    opened = cycle_pb2.WindowOpened(run=run_id, cycle=1, state=state)
    assert await buses["coordinator"].publish_fact(run_id, "train", 1, "opened", opened)
    version = cycle_pb2.VersionPublished(run=run_id, cycle=1, version=1, state=missing)
    assert await buses["aggregator"].publish_fact(run_id, "merge", 1, "version", version)
    card = await store.put_bytes(b"# A card of <b>this</b> expert", "text/markdown", REALM_PUBLIC)
    record = json.dumps({"card": {"digest": card.digest, "bytes": card.size}}).encode()
    library = await bus_factory(identities["library"], own_nats.url)
    for expert in ("medical-1", "medical-2"):
        deposit = run_pb2.ExpertDeposited(
            run=run_id, expert_id=expert, domain="medical", expert=state,
            record=await store.put_bytes(record, "application/json", REALM_PUBLIC),
        )  # fmt: skip
        assert await library.publish_fact(run_id, "library", 0, "deposited", deposit, expert)

    env = {"CONNITO_NATS_URL": own_nats.url, **store_env(object_store, store)}
    console = Console("console", tmp_path / "console", identities["customer"], roster, env)
    try:
        address = await console.start().read_everything()
        assert "Verify" in (await browser.get(f"{address}/runs/{run_id}/lineage")).text
        verify = f"{address}/runs/{run_id}/verify"
        assert "The bytes hold." in (await browser.post(f"{verify}/0")).text
        assert "The store does not have it." in (await browser.post(f"{verify}/1")).text
        assert (await browser.post(f"{verify}/2")).status_code == 404
        foreign = await browser.post(f"{verify}/0", headers={"Sec-Fetch-Site": "cross-site"})
        assert foreign.status_code == 403
        page = (await browser.get(f"{address}/library/medical-1")).text
        assert "<h3>A card of &lt;b&gt;this&lt;/b&gt; expert</h3>" in page
        assert (await browser.get(f"{address}/library/medical-3")).status_code == 404
        both = (await browser.get(f"{address}/library/compare?id=medical-1&id=medical-2")).text
        assert both.count('href="/library/medical-') == 2
        assert "at least two" in (await browser.get(f"{address}/library/compare?id=medical-1")).text
        assert "medical-2" in (await browser.get(f"{address}/library?q=medical")).text
    finally:
        console.kill()


async def test_with_a_token_nothing_is_shown_without_it(process: Console, browser: httpx2.AsyncClient) -> None:
    process._env["CONNITO_CONSOLE_TOKEN"] = TOKEN
    process._env["CONNITO_CONSOLE_HOST"] = "0.0.0.0"
    address = await process.start().read_everything()
    for path in ("/", "/bus", "/library", "/runs/r1", "/static/%2e%2e/bus", "//bus", "/login/../bus"):
        refused = await browser.get(address + path, headers={"Accept": "*/*"})
        assert refused.status_code in (401, 404), path
        assert "Dead letters" not in refused.text
    asked = await browser.get(address + "/")
    assert (asked.status_code, asked.headers["location"]) == (303, "/login")
    stream = await browser.get(address + "/", headers={"Accept": "text/event-stream"})
    assert stream.status_code == 401
    assert (await browser.post(address + "/login", data={"token": "wrong"})).status_code == 403
    assert (await browser.post(address + "/login", data={"token": "x" * 10_000})).status_code == 403

    bearer = await browser.get(address + "/", headers={"Authorization": f"Bearer {TOKEN}"})
    assert "There is no run yet" in bearer.text
    welcome = await browser.post(address + "/login", data={"token": TOKEN})
    assert welcome.status_code == 303
    cookie = welcome.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in cookie
    assert "There is no run yet" in (await browser.get(address + "/")).text
    await browser.post(address + "/logout")
    assert (await browser.get(address + "/")).status_code == 303
    assert TOKEN not in process.log.read_text()


async def test_on_loopback_another_sites_name_is_not_answered(process: Console, browser: httpx2.AsyncClient) -> None:
    address = await process.start().read_everything()
    assert (await browser.get(address)).status_code == 200
    assert (await browser.get(address, headers={"Host": "rebound.example.com"})).status_code == 421


def test_open_to_the_network_without_a_token_it_does_not_start(process: Console) -> None:
    process._env["CONNITO_CONSOLE_HOST"] = "0.0.0.0"
    process.start()
    assert process.process is not None
    assert process.process.wait(PATIENCE) == 1
    assert "CONNITO_CONSOLE_TOKEN" in process.log.read_text()
