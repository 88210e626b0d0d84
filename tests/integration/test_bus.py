"""The bus against a real broker: facts written once, followers that survive restarts, work queues, refusals."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from connito.bus import Bus, CaughtUp, streams
from connito.bus.consume import FAULT_LIMIT
from connito.bus.handover import take_over
from connito.errors import Fatal, Invalid, ObjectMissing, Retry
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer
from connito.runtime.waiting import WAITING
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.wire import subjects
from connito.wire.envelope import open_bytes, seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.parts import MAX_FACT_BYTES
from connito.wire.roster import Roster
from connito.wire.verification import verify_fact

from tests.integration.conftest import BusFactory, declare_streams
from tests.support.desk import desk
from tests.support.waiting import PATIENCE, declared

pytestmark = pytest.mark.integration


def opened(run: str, cycle: int, version: int = 0) -> cycle_pb2.WindowOpened:
    return cycle_pb2.WindowOpened(run=run, cycle=cycle, window=cycle_pb2.WINDOW_TRAIN, version=version)


class FewSubscriptions(NatsServer):
    """Allows each connection as many as following four streams takes, and a few more."""

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"max_subscriptions": 12}


async def next_record(items: AsyncIterator[Record | CaughtUp], timeout: float = PATIENCE) -> Record:
    async with asyncio.timeout(timeout):
        async for item in items:
            if isinstance(item, Record):
                return item
    raise AssertionError("the follower ended")


async def read_stored(bus: Bus, names: list[str], run: str) -> list[Record]:
    records = []
    async with asyncio.timeout(PATIENCE):
        async for item in bus.follow(names, run):
            if isinstance(item, CaughtUp):
                break
            records.append(item)
    return records


class TestFacts:
    async def test_written_once(self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str) -> None:
        bus = await bus_factory(identities["coordinator"])
        assert await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1, version=1))
        assert not await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1, version=2))
        (record,) = await read_stored(bus, ["TRAIN"], run_id)
        assert open_bytes(record.data, record.subject).read(cycle_pb2.WindowOpened).version == 1
        assert record.headers["traceparent"].startswith("00-")

    async def test_one_of_many_racing_writers_wins(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        buses = [await bus_factory(identities["coordinator"]) for _ in range(4)]
        won = await asyncio.gather(
            *(
                bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1, version=i))
                for i, bus in enumerate(buses)
            )
        )
        assert sorted(won) == [False, False, False, True]
        (record,) = await read_stored(buses[0], ["TRAIN"], run_id)
        assert open_bytes(record.data, record.subject).read(cycle_pb2.WindowOpened).version == won.index(True)

    async def test_our_own_message_is_recognised_when_its_acknowledgement_was_lost(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"])
        subject = subjects.fact(run_id, "train", 1, "opened")
        data = seal(identities["coordinator"], subject, opened(run_id, 1)).SerializeToString()
        await bus.js.publish(subject, data)
        assert await bus._publish_once(subject, data, "train.opened")

    async def test_a_squatter_without_the_role_does_not_keep_the_author_out(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"])
        subject = subjects.fact(run_id, "train", 1, "opened")
        forged = seal(identities["miner"], subject, opened(run_id, 1, version=666)).SerializeToString()
        await bus.js.publish(subject, forged)
        assert await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1, version=1))
        assert not await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1, version=2))

    async def test_a_fact_of_many_is_written_in_parts_and_read_as_one(
        self, bus_factory: BusFactory, identities: dict[str, Identity], roster: Roster, run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"])
        await read_stored(bus, ["TRAIN"], run_id)
        whole = cycle_pb2.WindowOpened(run=run_id, cycle=1, expected=[f"U{number:055d}" for number in range(5000)])
        assert await bus.publish_fact(run_id, "train", 1, "opened", whole)
        other = cycle_pb2.WindowOpened(run=run_id, cycle=1, expected=[f"U{number:055d}" for number in range(4000)])
        assert not await bus.publish_fact(run_id, "train", 1, "opened", other)
        records = await read_stored(bus, ["TRAIN"], run_id)
        assert max(len(record.data) for record in records) <= MAX_FACT_BYTES
        log = Log(roster)
        found = [fact for record in records if (fact := log.apply(record)) is not None]
        assert [fact.message for fact in found] == [whole]
        stored = await bus.last_record(subjects.fact(run_id, "train", 1, "opened"))
        assert stored is not None
        assert verify_fact(stored, roster).message == whole

    async def test_too_large_is_refused_before_it_is_sent(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["validator"])
        report = cycle_pb2.ScoreReport(run=run_id, cycle=1, seed=b"x" * (1 << 20))
        with pytest.raises(Invalid, match="artifact") as caught:
            await bus.publish_fact(run_id, "validate", 1, "report", report, identities["validator"].public)
        assert caught.value.reason == reasons_pb2.REASON_OVERSIZED

    async def test_broker_away_is_retry_in_seconds(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"], own_nats.url)
        own_nats.kill()
        began = time.monotonic()
        with pytest.raises(Retry, match=r"broker|answers"):
            await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1))
        assert time.monotonic() - began < PATIENCE
        own_nats.start()
        async with asyncio.timeout(PATIENCE):
            while True:
                with suppress(Retry):
                    assert await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1))
                    break

    async def test_no_broker_at_all(self, identities: dict[str, Identity]) -> None:
        with pytest.raises(Retry, match="no broker at nats://127"):
            await Bus.connect("nats://127.0.0.1:1", identities["miner"], "test")

    async def test_an_unexpected_duplicate_is_a_security_event(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bus = await bus_factory(identities["miner"])
        subject = subjects.ingress(run_id, identities["miner"].public, "trained")
        data = seal(identities["miner"], subject, cycle_pb2.TrainingFinished(run=run_id)).SerializeToString()
        await bus._publish(subject, data, {}, "ingress.trained")
        await bus._publish(subject, data, {}, "ingress.trained")
        assert "took a new message for a duplicate" in "".join(capsys.readouterr())


class TestPermissions:
    @pytest.fixture
    async def guarded(self, tmp_path: Path, identities: dict[str, Identity]) -> AsyncIterator[NatsServer]:
        accounts = Accounts(tmp_path / "accounts")
        accounts.make()
        with NatsServer(tmp_path / "guarded", accounts=accounts) as server:
            operator = accounts.welcome("operator", Identity.generate())
            async with await Bus.connect(server.url, operator, "operator") as bus:
                await declared(bus.js)
            identities["miner"] = accounts.welcome("miner", identities["miner"])
            async with desk(server.url, accounts.welcome("committer", identities["committer"])):
                yield server

    async def test_denied_publish_names_the_subject(
        self, guarded: Any, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["miner"], guarded.url)
        assert await bus.publish_ingress(run_id, "trained", cycle_pb2.TrainingFinished(run=run_id, cycle=1)) == 1
        with pytest.raises(Invalid, match=rf"connito\.v1\.{run_id}\.train\.1\.opened") as caught:
            await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1))
        assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED

    async def test_a_report_in_parts_is_its_validators_own(
        self, guarded: Any, bus_factory: BusFactory, identities: dict[str, Identity], roster: Roster, run_id: str
    ) -> None:
        validator = guarded.accounts.welcome("validator", identities["validator"])
        bus = await bus_factory(validator, guarded.url)
        scores = [cycle_pb2.SubmissionScore(miner=f"U{number:055d}", detail="x" * 900) for number in range(200)]
        report = cycle_pb2.ScoreReport(run=run_id, cycle=1, validator=validator.public, scores=scores)
        assert await bus.publish_fact(run_id, "validate", 1, "report", report, validator.public)
        log = Log(roster)
        for record in await read_stored(bus, ["VALIDATE"], run_id):
            log.apply(record)
        assert log.runs[run_id].reports(1)[validator.public].message == report

    async def test_denied_stream_names_it(
        self, guarded: Any, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["miner"], guarded.url)
        assert await read_stored(bus, ["TRAIN"], run_id) == []
        with pytest.raises(Invalid, match="ADVISORIES") as caught:
            await next_record(bus.follow(["ADVISORIES"], run_id))
        assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED

    async def test_unknown_key_is_refused(self, guarded: Any, bus_factory: BusFactory) -> None:
        stranger = Identity.generate()
        with pytest.raises(Invalid, match=stranger.public):
            await bus_factory(stranger, guarded.url)

    # The client library leaves sockets of refused logins to the garbage collector.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    async def test_a_key_that_loses_its_place_ends_the_follower(
        self, guarded: Any, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["miner"], guarded.url)
        items = bus.follow(["TRAIN"], run_id)
        assert isinstance(await anext(items), CaughtUp)
        guarded.accounts.revoke([identities["miner"].public])
        await guarded.accounts.push(guarded.url)
        with pytest.raises(Fatal, match=rf"refuses {identities['miner'].public}"):
            await next_record(items)
        await items.aclose()


class TestFollow:
    async def test_in_order_then_caught_up_then_live(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"])
        for cycle in range(1, 601):
            await bus.publish_fact(run_id, "train", cycle, "opened", opened(run_id, cycle))
        await bus.publish_fact(run_id, "merge", 1, "opened", opened(run_id, 1))
        stored = await read_stored(bus, ["TRAIN", "MERGE"], run_id)
        trained = [record for record in stored if record.stream == "TRAIN"]
        assert [record.subject.split(".")[4] for record in trained] == [str(n) for n in range(1, 601)]
        assert len(stored) == 601
        items = bus.follow(["TRAIN"], run_id, start={"TRAIN": trained[-1].sequence})
        assert (await next_record(items)).sequence == trained[-1].sequence
        assert isinstance(await anext(items), CaughtUp)
        await bus.publish_fact(run_id, "train", 601, "opened", opened(run_id, 601))
        live = await next_record(items)
        assert live.subject.endswith("train.601.opened")
        assert abs(live.time_unix_ms / 1000 - time.time()) < PATIENCE
        await items.aclose()

    async def test_caught_up_comes_once_also_when_nothing_is_there(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"])
        items = bus.follow(streams.FACT_STREAMS, run_id)
        assert isinstance(await anext(items), CaughtUp)
        for cycle in (1, 2):
            await bus.publish_fact(run_id, "merge", cycle, "opened", opened(run_id, cycle))
            assert isinstance(await anext(items), Record)
        await items.aclose()

    async def test_another_run_is_not_seen(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"])
        await bus.publish_fact(run_id + "-other", "train", 1, "opened", opened(run_id + "-other", 1))
        assert await read_stored(bus, ["TRAIN"], run_id) == []

    async def test_continues_across_a_killed_broker(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        writer = await bus_factory(identities["coordinator"], own_nats.url)
        reader = await bus_factory(identities["miner"], own_nats.url)
        items = reader.follow(["TRAIN", "MERGE"], run_id)
        await writer.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1))
        assert (await next_record(items)).subject.endswith("train.1.opened")
        own_nats.kill()
        own_nats.start()
        publishing = asyncio.create_task(self._publish_stubbornly(writer, run_id))
        assert (await next_record(items)).subject.endswith("train.2.opened")
        assert (await next_record(items)).subject.endswith("train.3.opened")
        await publishing
        await items.aclose()

    # The client library leaves its halves of the connections that the stalled broker never took up.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    async def test_asks_for_nothing_anew_while_the_broker_is_away(
        self, tmp_path: Path, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        """The client library keeps each subscription for the broker that comes back, which may allow few, and hangs up then."""
        names = ["TRAIN", "MERGE", "COMMIT", "SUBMIT"]
        with FewSubscriptions(tmp_path / "nats") as server:
            await declare_streams(server.url)
            reader = await bus_factory(identities["miner"], server.url)
            items = reader.follow(names, run_id)
            assert isinstance(await anext(items), CaughtUp)
            os.kill(server.pid, signal.SIGSTOP)
            # Long enough for some attempts at each stream.
            waiting = asyncio.create_task(next_record(items, 80))
            await asyncio.wait([waiting], timeout=25)
            os.kill(server.pid, signal.SIGCONT)
            writer = await bus_factory(identities["coordinator"], server.url)
            await self._publish_stubbornly(writer, run_id)
            assert (await waiting).subject.endswith("train.2.opened")
            await items.aclose()

    async def test_waits_for_streams_that_are_not_there_yet(
        self, tmp_path: Path, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        """A broker that just came back answers "no responders" until its streams are up."""
        with NatsServer(tmp_path / "bare") as server:
            bus = await bus_factory(identities["coordinator"], server.url)
            items = bus.follow(["TRAIN"], run_id)
            first = asyncio.ensure_future(anext(items))
            assert not (await asyncio.wait([first], timeout=0.8))[0]
            await declare_streams(server.url)
            async with asyncio.timeout(PATIENCE):
                assert isinstance(await first, CaughtUp)
            await items.aclose()

    @staticmethod
    async def _publish_stubbornly(bus: Bus, run: str) -> None:
        for cycle in (2, 3):
            while True:
                with suppress(Retry):
                    await bus.publish_fact(run, "train", cycle, "opened", opened(run, cycle))
                    break

    async def test_notices_a_stalled_broker(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"], own_nats.url)
        items = bus.follow(["TRAIN"], run_id)
        assert isinstance(await anext(items), CaughtUp)
        os.kill(own_nats.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(next_record(items, 40))
        done, _ = await asyncio.wait([waiting], timeout=6)
        assert not done
        os.kill(own_nats.pid, signal.SIGCONT)
        await self._publish_stubbornly(bus, run_id)
        assert (await waiting).subject.endswith("train.2.opened")
        await items.aclose()

    async def test_the_position_in_the_log(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"], own_nats.url)
        assert await bus.last_sequence("TRAIN") == 0
        await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1))
        assert await bus.last_sequence("TRAIN") == 1


async def test_a_hop_takes_milliseconds(
    bus_factory: BusFactory, identities: dict[str, Identity], run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cycle is a chain of about 15 hops: publish, store with sync, deliver, decide."""
    writer, reader = await bus_factory(identities["coordinator"]), await bus_factory(identities["aggregator"])
    items = reader.follow(["TRAIN"], run_id)
    assert isinstance(await anext(items), CaughtUp)
    hops = []
    for cycle in range(1, 101):
        began = time.perf_counter()
        await writer.publish_fact(run_id, "train", cycle, "opened", opened(run_id, cycle))
        await anext(items)
        hops.append(time.perf_counter() - began)
    await items.aclose()
    hops.sort()
    with capsys.disabled():
        print(f"\nhop publish -> acknowledged and followed: p50 {hops[50] * 1e3:.2f} ms, p95 {hops[95] * 1e3:.2f} ms")
    # The quickest tenth: what the code takes, not what else runs on the machine.
    assert hops[10] < 0.05


class TestConsume:
    @staticmethod
    async def say(bus: Bus, run: str, count: int = 1) -> None:
        for cycle in range(1, count + 1):
            await bus.publish_ingress(run, "commitment", cycle_pb2.Commitment(run=run, cycle=cycle))

    async def test_in_order_and_the_floor_follows(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["miner"], own_nats.url)
        await self.say(bus, run_id, 5)
        seen: list[int] = []
        all_seen = asyncio.Event()

        async def handle(record: Record) -> None:
            seen.append(record.sequence)
            if len(seen) == 5:
                all_seen.set()

        task = asyncio.create_task(bus.consume("committer", handle))
        async with asyncio.timeout(PATIENCE):
            await all_seen.wait()
            while await bus.ack_floor("committer") < 5:  # noqa: ASYNC110 - the broker's state, asked for
                await asyncio.sleep(0.01)
        assert seen == [1, 2, 3, 4, 5]
        task.cancel()
        await asyncio.wait([task])

    async def test_retry_comes_again_before_what_follows_it(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["miner"], own_nats.url)
        await self.say(bus, run_id, 2)
        seen: list[int] = []
        done = asyncio.Event()

        async def handle(record: Record) -> None:
            seen.append(record.sequence)
            if len(seen) < 3:
                raise Retry("not yet", after=0.05)
            if record.sequence == 2:
                done.set()

        task = asyncio.create_task(bus.consume("committer", handle, lane=lambda record: record.subject))
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        assert seen == [1, 1, 1, 2]
        task.cancel()
        await asyncio.wait([task])

    async def test_a_request_that_a_killed_broker_answered_in_part_is_made_again(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["miner"], own_nats.url)
        await self.say(bus, run_id)
        seen: asyncio.Queue[int] = asyncio.Queue()

        async def handle(record: Record) -> None:
            await seen.put(record.sequence)

        task = asyncio.create_task(bus.consume("committer", handle, lane=lambda record: record.subject))
        async with asyncio.timeout(PATIENCE):
            assert await seen.get() == 1
            while await bus.ack_floor("committer") < 1:  # noqa: ASYNC110 - the broker's state, asked for
                await asyncio.sleep(0.01)
        own_nats.kill()
        own_nats.start()
        async with asyncio.timeout(PATIENCE):
            while True:
                with suppress(Retry):
                    await bus.publish_ingress(run_id, "commitment", cycle_pb2.Commitment(run=run_id, cycle=2))
                    break
            while await seen.get() != 2:
                pass
        task.cancel()
        await asyncio.wait([task])

    async def test_lanes_take_turns_and_one_that_waits_holds_up_no_other(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        loud = await bus_factory(identities["miner"], own_nats.url)
        quiet = await bus_factory(identities["customer"], own_nats.url)
        await self.say(loud, run_id, 20)
        await self.say(quiet, run_id, 2)
        seen: dict[str, list[int]] = {"loud": [], "quiet": []}
        order: list[str] = []
        done = asyncio.Event()

        async def handle(record: Record) -> None:
            who = "loud" if loud.identity.public in record.subject else "quiet"
            seen[who].append(record.sequence)
            order.append(who)
            if who == "loud" and len(seen[who]) == 2:
                raise Retry("not yet", after=0.3)
            if len(order) == 23:
                done.set()

        committer = await bus_factory(identities["committer"], own_nats.url)
        skipped: list[int] = []

        def skip(record: Record) -> bool:
            skipped.append(record.sequence)
            return False

        task = asyncio.create_task(
            committer.consume("committer", handle, lane=lambda record: record.subject.split(".")[4], skip=skip)
        )
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        assert seen["loud"] == sorted(seen["loud"])
        assert seen["loud"].count(2) == 2
        assert seen["quiet"] == [21, 22]
        assert order.index("quiet") < 10, "who came last did not wait for all of the other's"
        assert sorted(skipped) == list(range(1, 23))
        async with asyncio.timeout(PATIENCE):
            while await committer.ack_floor("committer") < 22:  # noqa: ASYNC110 - the broker's state, asked for
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])

    async def test_what_somebody_drew_and_left_comes_first_and_at_once(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        """Not after the time that the broker leaves a handler, and not while somebody who stands still would get it."""
        before = await bus_factory(identities["committer"], own_nats.url)
        after = await bus_factory(identities["committer"], own_nats.url)
        nc, drawn = before.connection.nc, asyncio.Queue[Any]()
        inbox = nc.new_inbox()
        await nc.subscribe(inbox, cb=drawn.put)
        ask = "$JS.API.CONSUMER.MSG.NEXT.INGRESS.committer"
        await self.say(after, run_id, 3)
        await nc.publish(ask, b'{"batch": 3, "expires": 30000000000}', reply=inbox)
        async with asyncio.timeout(PATIENCE):
            first, *_ = [await drawn.get() for _ in range(3)]
        await first.ack()
        await nc.publish(ask, b'{"batch": 1, "expires": 30000000000}', reply=inbox)
        await nc.flush()
        assert not await take_over(after, "committer")
        await before.close()
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            while not await take_over(after, "committer"):  # noqa: ASYNC110 - the broker's state, asked for
                await asyncio.sleep(0.02)
        await self.say(after, run_id, 5)
        seen: list[int] = []
        done = asyncio.Event()

        async def handle(record: Record) -> None:
            seen.append(record.sequence)
            if len(seen) == 4:
                done.set()

        task = asyncio.create_task(after.consume("committer", handle))
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        assert seen == [2, 3, 4, 5]
        assert time.monotonic() - began < streams.DURABLES["committer"].ack_wait - 1
        task.cancel()
        await asyncio.wait([task])

    async def test_invalid_goes_to_the_dead_letters_and_the_next_is_handled(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["committer"], own_nats.url)
        await self.say(bus, run_id, 2)
        done = asyncio.Event()

        async def handle(record: Record) -> None:
            if record.sequence == 1:
                raise Invalid("no such thing", reason=reasons_pb2.REASON_UNKNOWN_RUN)
            done.set()

        task = asyncio.create_task(bus.consume("committer", handle))
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        record = await bus.last_record("connito.dlq.v1.INGRESS.1")
        assert record is not None
        letter = open_bytes(record.data, record.subject).read(cycle_pb2.DeadLetter)
        assert letter.reason == reasons_pb2.REASON_UNKNOWN_RUN
        assert (letter.stream, letter.sequence, letter.service) == ("INGRESS", 1, "committer")
        assert open_bytes(letter.body, letter.subject).read(cycle_pb2.Commitment).run == run_id
        task.cancel()
        await asyncio.wait([task])

    async def test_a_message_that_makes_its_handler_fail_is_set_aside_and_the_next_is_handled(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("connito.runtime.waiting.LONGEST", 0.01)
        bus = await bus_factory(identities["committer"], own_nats.url)
        await self.say(bus, run_id, 2)
        done, tries = asyncio.Event(), 0

        async def handle(record: Record) -> None:
            nonlocal tries
            if record.sequence == 1:
                tries += 1
                raise ZeroDivisionError
            if tries >= FAULT_LIMIT:
                done.set()
            else:
                raise Retry("not yet", after=0.01)

        task = asyncio.create_task(bus.consume("committer", handle))
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        record = await bus.last_record("connito.dlq.v1.INGRESS.1")
        assert record is not None
        letter = open_bytes(record.data, record.subject).read(cycle_pb2.DeadLetter)
        assert (letter.reason, tries) == (reasons_pb2.REASON_FAULT, FAULT_LIMIT)
        assert "ZeroDivisionError" in letter.detail
        task.cancel()
        await asyncio.wait([task])

    async def test_what_is_fatal_is_raised_and_the_message_delivered_again(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["committer"], own_nats.url)
        await self.say(bus, run_id)

        async def break_down(record: Record) -> None:
            raise Fatal("the lease is lost")

        with pytest.raises(Fatal):
            await bus.consume("committer", break_down)
        again = asyncio.Event()

        async def handle(record: Record) -> None:
            again.set()

        task = asyncio.create_task(bus.consume("committer", handle))
        async with asyncio.timeout(PATIENCE):
            await again.wait()
        task.cancel()
        await asyncio.wait([task])

    async def test_headers_of_a_sender_can_not_pass_for_the_servers(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        """A client library that believes them would never hand the message out, and the queue would stand still."""
        bus = await bus_factory(identities["miner"], own_nats.url)
        subject = subjects.ingress(run_id, identities["miner"].public, "commitment")
        hostile = [
            b"NATS/1.0 503\r\n\r\n",
            b"NATS/1.0\r\nStatus: 409\r\n\r\n",
            b"NATS/1.0 100 Idle\r\n\r\n",
            b"NATS/1.0\r\nno colon\r\n\r\n",
            b"NATS/1.0\r\nk\xff: v\xfe\r\n\r\n",
            b"garbage\r\n\r\n",
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", own_nats.port)
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        for head in hostile:
            writer.write(f"HPUB {subject} {len(head)} {len(head) + 1}\r\n".encode() + head + b"x\r\n")
        writer.write(b"PING\r\n")
        await reader.readuntil(b"PONG")
        writer.close()
        await writer.wait_closed()
        await self.say(bus, run_id)
        last = len(hostile) + 1
        assert [record.sequence for record in await read_stored(bus, ["INGRESS"], run_id)] == list(range(1, last + 1))
        seen: list[int] = []
        done = asyncio.Event()

        async def handle(record: Record) -> None:
            seen.append(record.sequence)
            if record.sequence == last:
                done.set()

        task = asyncio.create_task(bus.consume("committer", handle))
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        assert seen == list(range(1, last + 1))
        task.cancel()
        await asyncio.wait([task])

    async def test_a_slow_handler_keeps_its_message(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["committer"], own_nats.url)
        await self.say(bus, run_id, 2)
        seen: list[int] = []
        done = asyncio.Event()

        async def handle(record: Record) -> None:
            seen.append(record.sequence)
            if record.sequence == 1:
                await asyncio.sleep(streams.DURABLES["committer"].ack_wait + 1.5)
            else:
                done.set()

        task = asyncio.create_task(bus.consume("committer", handle, heartbeat=0.5))
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        assert seen == [1, 2]
        task.cancel()
        await asyncio.wait([task])

    async def test_replicas_share_the_work_across_a_restart(
        self, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        handled: set[str] = set()
        done = asyncio.Event()

        async def handle(record: Record) -> None:
            handled.add(record.subject)
            if len(handled) == 6:
                done.set()

        bus = await bus_factory(identities["coordinator"], own_nats.url)
        tasks = [asyncio.create_task(bus.consume("selector", handle, concurrency=2)) for _ in range(2)]
        for number in range(6):
            if number == 3:
                own_nats.kill()
                own_nats.start()
            run = f"{run_id}-{number}"
            created = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run))
            while True:
                with suppress(Retry):
                    await bus.publish_fact(run, "run", 0, "created", created)
                    break
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class TestEndpoints:
    async def test_found_once_registered(
        self, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
    ) -> None:
        bus = await bus_factory(identities["coordinator"])
        name = f"service-{run_id}"
        finding = asyncio.create_task(bus.find_endpoint(name, timeout=PATIENCE))
        await bus.register_endpoint(name, "127.0.0.1:7001")
        assert await finding == "127.0.0.1:7001"

    async def test_missing_says_who(self, bus_factory: BusFactory, identities: dict[str, Identity]) -> None:
        bus = await bus_factory(identities["coordinator"])
        with pytest.raises(Retry, match="no nobody has registered"):
            await bus.find_endpoint("nobody", timeout=0.2)


async def test_declaring_twice_changes_nothing_and_the_log_is_append_only(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id, 1))
    await declared(bus.js)
    rows = {row["name"]: row for row in await streams.describe(bus.js)}
    assert rows["TRAIN"]["messages"] == 1
    assert set(rows) == set(streams.STREAMS)
    with pytest.raises(Exception, match="delete not permitted"):
        await bus.js.delete_msg("TRAIN", 1)


async def test_releasing_a_run_drops_its_windows_and_nothing_else(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity], run_id: str
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    for run in (run_id, f"{run_id}-2"):
        await bus.publish_fact(run, "run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run)))
        await bus.publish_fact(run, "train", 1, "opened", opened(run, 1))
    await streams.release(bus.js, run_id)
    await streams.release(bus.js, run_id)
    left = {record.subject async for record in bus.stored(("RUNS", "TRAIN"))}
    assert left == {
        f"connito.v1.{run_id}.run.0.created",
        f"connito.v1.{run_id}-2.run.0.created",
        f"connito.v1.{run_id}-2.train.1.opened",
    }
    # What was released stays said: followers go on behind it.
    assert await bus.publish_fact(f"{run_id}-2", "train", 2, "opened", opened(f"{run_id}-2", 2))
    assert await bus.last_sequence("TRAIN") == 3


async def test_a_message_that_waits_for_the_environment_is_never_given_up(
    own_nats: NatsServer,
    bus_factory: BusFactory,
    identities: dict[str, Identity],
    run_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long an outage is, what was acknowledged gets its answer after it: in a lane, and given back to the broker."""
    monkeypatch.setattr("connito.runtime.waiting.LONGEST", 0.001)
    bus = await bus_factory(identities["committer"], own_nats.url)
    for lane in (None, lambda record: "lane"):
        sequence, tries, done = await bus.last_sequence("INGRESS") + 1, 0, asyncio.Event()
        await TestConsume.say(bus, run_id)
        faults = itertools.cycle(
            [Retry("away", after=0.001), ObjectMissing("gone"), OSError(errno.ENOSPC, "full", "cache"), MemoryError()]
        )

        async def handle(record: Record) -> None:
            nonlocal tries
            tries += 1
            if tries <= 120:
                raise next(faults)  # noqa: B023 - each handler is done before the next
            done.set()  # noqa: B023

        task = asyncio.create_task(bus.consume("committer", handle, lane=lane))
        async with asyncio.timeout(PATIENCE):
            await done.wait()
        assert await bus.last_record(f"connito.dlq.v1.INGRESS.{sequence}") is None
        task.cancel()
        await asyncio.wait([task])


async def test_a_stream_that_is_not_there_is_named_to_who_reads_and_shown_by_who_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a broker's files are damaged: a command ends, a service waits."""
    monkeypatch.setattr("connito.bus.client.STORED_PATIENCE", 0.1)
    with NatsServer(tmp_path) as server:
        async with await Bus.connect(server.url, None, "reader") as bus:
            with pytest.raises(Retry, match="for stream RUNS in time; run `connito streams ensure`"):
                await anext(bus.stored(["RUNS"]))
            following = asyncio.ensure_future(anext(bus.follow(["MERGE"])))
            async with asyncio.timeout(PATIENCE):
                while not any("MERGE" in one.what for one in WAITING.entries()):  # noqa: ASYNC110 - a reader's turn
                    await asyncio.sleep(0.01)
            await declared(bus.js)
            assert isinstance(await asyncio.wait_for(following, PATIENCE), CaughtUp)
            assert not any("MERGE" in one.what for one in WAITING.entries())
