"""The desk at which strangers' questions are counted before the broker works for them (docs/adr/0054-a-share-of-connections.md).

The broker answers whatever it is asked: any number of stored messages, through any filter, as often as somebody asks. Here a
question has one of two forms, a batch no more than readers of ours take, and a key so many a second. What passes is handed on,
and the broker answers whoever asked: nothing that was stored comes through here. What strangers say is counted too, before
the broker has stored it: who floods is shut out.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from nats.errors import Error as NatsError

from connito.bus.connection import REQUEST_TIMEOUT, Connection, speaking
from connito.bus.follow import BATCH, BATCH_BYTES
from connito.bus.guard import Loud
from connito.bus.offences import report
from connito.bus.permissions import ANSWERED, ASKED, READ_STREAMS, SAID
from connito.bus.streams import STREAMS
from connito.errors import Invalid
from connito.runtime.limits import RateLimit
from connito.runtime.logs import get_logger
from connito.v1 import reasons_pb2 as reasons
from connito.wire.identity import Identity
from connito.wire.tls import Tls

log = get_logger("desk")

# A batch is a few milliseconds of the broker's, one message the tenth of one. A key that follows everything there is asks some
# ten times a second; one that has a long log to read takes 50 batches a second, 12 MB.
PER_SECOND, BURST, OF_BATCH = 100.0, 200.0, 2.0
# So many wait for their turn: an honest program has one under way for each stream, and a few beside.
WAITING = 32
AGAIN_SECONDS = 1.0
# Who asked has given up on what lay here for longer.
LATE_SECONDS = REQUEST_TIMEOUT

Question = dict[str, Any]


class Desk:
    """Hands strangers' questions on. Replicas share them; a key has its rate at each."""

    def __init__(self, url: str, identity: Identity, name: str, tls: Tls, shut_out: Callable[[str], None]) -> None:
        self._token = next(iter(speaking(identity.passes)), "")
        self._connect: Callable[[], Connection] = lambda: Connection(url, identity, f"{name} desk", tls, self._token)
        self._connection, self._loud = self._connect(), Loud(shut_out)
        self.open = asyncio.Event()
        self._rate = RateLimit(PER_SECOND, BURST, time.monotonic)
        # When this process was last at work, and had nothing lying here from before.
        self._awake = self._rate.clock()
        self._waiting: dict[str, deque[tuple[str, Question, str]]] = {}
        self._turns: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Run until cancelled. What fails here is tried again, and ends nothing beside it."""
        if not self._token:
            # A broker that lets in by key alone has no strangers.
            await asyncio.Event().wait()
        while True:
            try:
                await self._connection.open()
                await self._connection.nc.subscribe(f"{ASKED}.*.*", queue="desk", cb=self._on_question)
                for subject, place in SAID.items():
                    await self._connection.nc.subscribe(subject, cb=partial(self._on_said, place))
                await self._connection.nc.flush()
                self.open.set()
                while not self._connection.nc.is_closed:
                    self._awake = self._rate.clock()
                    await asyncio.sleep(AGAIN_SECONDS)
                    if self._overslept:
                        # What came meanwhile is passed over up to here.
                        await self._connection.nc.flush()
            except Exception as error:
                log.warning("strangers read nothing at the moment", error=str(error) or type(error).__name__)
            finally:
                await self._connection.close()
            await asyncio.sleep(AGAIN_SECONDS)
            self._connection = self._connect()

    @property
    def _overslept(self) -> bool:
        """Return whether what comes now may have lain here while this process was stopped: it was not all said at once."""
        return self._rate.clock() - self._awake > AGAIN_SECONDS + LATE_SECONDS

    async def _on_question(self, msg: Any) -> None:
        if self._overslept:
            return None
        # The broker has checked that the key in the subject is who asks.
        _, _, _, stream, key = msg.subject.split(".")
        if not msg.reply.startswith(f"{ANSWERED}.{key}."):
            return self._refuse(key, "a question whose answer would go to somebody else")
        try:
            question = checked(stream, msg.data)
        except (Invalid, ValueError, LookupError, TypeError, RecursionError):
            return self._refuse(key, "a question that no program of ours asks")
        asked = (f"$JS.API.DIRECT.GET.{stream}", question, msg.reply)
        waiting = self._waiting.get(key)
        if waiting is None:
            if later := self._ahead(key, question):
                self._waiting[key] = deque([asked])
                self._turn(key, later)
            else:
                await self._hand_on(*asked)
        elif len(waiting) < WAITING:
            waiting.append(asked)
        else:
            self._refuse(key, f"more questions than {PER_SECOND:.0f} a second")
        return None

    async def _on_said(self, place: int, msg: Any) -> None:
        if not self._overslept:
            self._loud.note(msg.subject.split(".")[place], self._rate.clock())

    def _ahead(self, key: str, question: Question) -> float:
        """Return how long a question has to wait, 0 where it is the key's turn, which it takes then."""
        try:
            self._rate.take(key, OF_BATCH if "batch" in question else 1.0)
        except Invalid as later:
            return later.after or AGAIN_SECONDS
        return 0.0

    async def _hand_on(self, subject: str, question: Question, reply: str) -> None:
        try:
            await self._connection.nc.publish(subject, json.dumps(question).encode(), reply=reply)
        except (NatsError, OSError) as error:
            # Whoever asked asks again.
            log.debug("a question is lost", error=str(error))

    def _turn(self, key: str, later: float) -> None:
        turn = asyncio.get_running_loop().create_task(self._work_off(key, later))
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)

    async def _work_off(self, key: str, later: float) -> None:
        """Hand on what waits, in its order and at the key's rate. Until nothing does, what comes is put behind it."""
        try:
            while waiting := self._waiting[key]:
                await asyncio.sleep(later)
                later = self._ahead(key, waiting[0][1])
                if not later:
                    await self._hand_on(*waiting.popleft())
        finally:
            del self._waiting[key]

    def _refuse(self, key: str, why: str) -> None:
        report("questions", key=key, reason=reasons.REASON_QUOTA_EXCEEDED, detail=why)
        self._loud.note(key, self._rate.clock())


def checked(stream: str, data: bytes) -> Question:
    """Return a question as it is handed on: for a batch, or for one message. Raises for what is neither.

    A filter is that of the stream, of all runs or of one, which the broker has an index for; the last message is that on one
    subject, or of all.
    """
    if stream not in READ_STREAMS:
        raise ValueError(stream)
    asked = json.loads(data)
    if not isinstance(asked, dict):
        raise TypeError(asked)
    if (subject := asked.get("last_by_subj")) is not None:
        if not isinstance(subject, str) or (subject != STREAMS[stream].filter() and set("*>") & set(subject)):
            raise ValueError(subject)
        return {"last_by_subj": subject}
    question: Question = {"seq": max(1, _number(asked["seq"]))}
    if "batch" in asked:
        question["batch"] = min(BATCH, _number(asked["batch"]))
        question["max_bytes"] = min(BATCH_BYTES, _number(asked.get("max_bytes", BATCH_BYTES)))
    if (only := asked.get("next_by_subj")) is not None:
        run = str(only).split(".")[2]
        of = STREAMS[stream]
        if only != of.filter() and only not in {
            of.filter("" if run == "*" else run, of_all=way) for way in (False, True)
        }:
            raise ValueError(only)
        question["next_by_subj"] = only
    return question


def _number(value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 63:
        raise ValueError(value)
    return value
